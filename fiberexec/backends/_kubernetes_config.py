"""Where the API server is and as whom it is asked: as the SDK reads that, and kubectl where the two differ."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from fiberexec._errors import ConfigError

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
_FILE = "~/.kube/config"
_METHODS = ("exec", "auth-provider")  # of a user: ways to credentials that fail without a word to the SDK's caller


class Setup(Exception):
    """There is no usable configuration: the message says why."""


def in_cluster() -> bool:
    """Whether this is a pod that may talk to its API server."""
    return bool(os.environ.get("KUBERNETES_SERVICE_HOST")) and os.path.isfile(f"{_ACCOUNT}/token")


def must_have_token(context: str | None) -> None:
    """Raise ConfigError in a pod that nobody has given a way to its API server."""
    told = context is not None or os.environ.get("KUBECONFIG") or os.path.exists(os.path.expanduser(_FILE))
    if os.environ.get("KUBERNETES_SERVICE_HOST") and not in_cluster() and not told:
        raise ConfigError(
            "this pod has no service account token, so that it cannot make pods. What to do: give it a service account with "
            "the Role that `fiberexec rbac --namespace NAMESPACE` prints (serviceAccountName), and its token "
            "(automountServiceAccountToken: true); or run its workers here, backend='local'"
        )


def is_own(context: str | None) -> bool:
    """Whether the configuration is that of the pod that this is."""
    return context is None and not os.environ.get("KUBECONFIG") and in_cluster()


def load(context: str | None) -> tuple[Any, str]:
    """(the SDK's configuration, its namespace) of a context, of KUBECONFIG, of the pod that this is, or of ~/.kube/config.

    Raises Setup, and what the SDK raises.
    """
    configuration = import_module("kubernetes.client").Configuration()
    if is_own(context):
        import_module("kubernetes.config").load_incluster_config(client_configuration=configuration)
        with open(f"{_ACCOUNT}/namespace", encoding="utf-8") as file:
            namespace = file.read().strip()
    else:
        namespace = _read(configuration, context)
    _log_in_to_proxy(configuration)
    _trim_tokens(configuration)
    return configuration, namespace or "default"


def _read(configuration: Any, context: str | None) -> str:
    config: Any = import_module("kubernetes.config")
    path = os.environ.get("KUBECONFIG") or os.path.expanduser(_FILE)
    merged = config.kube_config.KubeConfigMerger(path).config
    found = merged.value if merged is not None else {}
    contexts = {str(one["name"]): one.value.get("context") or {} for one in found.get("contexts", ())}
    if found and context is not None and context not in contexts:
        raise Setup(f"{path} has no context {context!r}; its contexts are: {', '.join(sorted(contexts)) or 'none'}")
    config.load_kube_config(config_file=path, context=context, client_configuration=configuration)
    chosen = contexts[context or found["current-context"]]
    user = next((one.value.get("user") or {} for one in found.get("users", ()) if one["name"] == chosen.get("user")), {})
    if any(method in user for method in _METHODS) and not (configuration.api_key or configuration.cert_file):
        command = (user.get("exec") or {}).get("command")
        giver = f"program {command!r}, which gives them," if command else "what gives them"
        raise Setup(
            f"user {chosen['user']!r} of {path} has no credentials: {giver} has failed. What to do: log in anew, as whoever "
            "gave you the kubeconfig says; `kubectl auth whoami` shows whether it works"
        )
    return str(chosen.get("namespace") or "")


def _log_in_to_proxy(configuration: Any) -> None:
    """The name and password in a proxy's URL are for it, and the SDK does not send them."""
    import urllib3

    login = urllib3.util.parse_url(configuration.proxy).auth if configuration.proxy else None
    if login and not configuration.proxy_headers:
        from urllib.parse import unquote

        configuration.proxy_headers = urllib3.make_headers(proxy_basic_auth=unquote(login))


def _trim_tokens(configuration: Any) -> None:
    """A line that ends in a token's file is no part of the token: the SDK would send it, and show the token in its error."""
    asked = configuration.get_api_key_with_prefix

    def trimmed(*arguments: Any, **keywords: Any) -> str | None:
        key = asked(*arguments, **keywords)
        return key if key is None else str(key).strip()

    configuration.get_api_key_with_prefix = trimmed
