"""Pods of a real cluster for the processes of tests."""

from __future__ import annotations

import json
import os

import services
from services import cluster


def settings(space: str, image: str, folder: str) -> dict[str, str]:
    """The environment of a program whose processes are to be pods of that namespace, which see that folder of this machine."""
    options = {
        "namespace": space,
        "advertise_address": cluster.ADDRESS,
        "user": os.getuid(),
        "volumes": {folder: {"hostPath": folder}},
    }
    return {
        "KUBECONFIG": services.require_kubernetes(),
        "FIBEREXEC_IMAGE": services.cluster_image(image),
        "FIBEREXEC_BACKEND_OPTIONS": json.dumps(options),
    }
