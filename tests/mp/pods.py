"""Pods of a real cluster for the processes of tests."""

from __future__ import annotations

import json
import os
from typing import Any

import services
from services import cluster

IN_A_POD = os.environ.get("KUBERNETES_SERVICE_HOST", "")  # then all comes from this pod: the namespace, the image, the address


def settings(space: str, image: str, folder: str, outpost: bool = False) -> dict[str, str]:
    """The environment of a program whose processes are to be pods of that namespace, which see that folder of this machine.

    outpost: pods reach it by one, as they do a program that is outside the cluster.
    """
    options: dict[str, Any] = {"user": os.getuid(), "volumes": {folder: {"hostPath": folder}}}
    if IN_A_POD:
        return {"KUBERNETES_SERVICE_HOST": IN_A_POD, "FIBEREXEC_BACKEND_OPTIONS": json.dumps(options)}
    options["namespace"] = space
    if not outpost:
        options["advertise_address"] = cluster.ADDRESS
    return {
        "KUBECONFIG": services.require_kubernetes(),
        "FIBEREXEC_IMAGE": services.cluster_image(image),
        "FIBEREXEC_BACKEND_OPTIONS": json.dumps(options),
    }
