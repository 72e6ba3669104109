"""The API server: where it is, as whom it is asked, and what is asked again when it is busy or away."""

from __future__ import annotations

import json
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any
from urllib.parse import urlencode, urlsplit

from fiberexec.backends import _kubernetes_config as configurations
from fiberexec.backends._containers import address_towards
from fiberexec.backends._kubernetes_config import Setup
from fiberexec.backends._lines import split

_CONNECT = 5.0  # seconds that a connection may take
_READ = 30.0  # and an answer
PATIENCE = 30.0  # seconds for which a call is made again, where its caller does not say
_LONGEST = 10.0  # between attempts, where the server does not say how long
_ASKED = 60.0  # and where it does
_UNHEARD = 10.0  # seconds after which a connection is dead that confirms nothing of what was sent
_PASSING = (429, 500, 502, 503, 504)
_RENEWED = 5.0  # seconds: credentials are not read more often
_logger = logging.getLogger("fiberexec")


class ApiError(Exception):
    """The server refused, or did not answer (``status`` 0). ``url`` is where it is."""

    def __init__(self, status: int, reason: str, message: str, url: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason  # Kubernetes' own word, such as "Forbidden"
        self.url = url
        self.retry_after = retry_after  # seconds

    @property
    def passing(self) -> bool:
        """Whether the same call may succeed later."""
        return self.status == 0 or self.status in _PASSING or (self.status == 409 and self.reason == "Conflict")

    @property
    def anonymous(self) -> bool:
        """Whether the server does not know who asks."""
        return self.status == 401 or (self.status == 403 and 'User "system:anonymous"' in str(self))


class _Server:
    """What a configuration says: the server's address, connections to it, and a token."""

    def __init__(self, configuration: Any, connections: int) -> None:
        import urllib3

        self.configuration = configuration
        self.url = str(configuration.host).rstrip("/")
        context = None
        if self.url.startswith("https"):
            context = ssl.create_default_context(cafile=configuration.ssl_ca_cert or None)
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # Python 3.13's default, which clusters' older CAs do not meet
            if not configuration.verify_ssl:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            if configuration.cert_file:
                # Now: the SDK removes the file at exit, before the last pods have been removed.
                context.load_cert_chain(configuration.cert_file, configuration.key_file)
        # A pooled connection may have died unnoticed, by a laptop's sleep or a router that forgets: there is time for another.
        unheard = [(socket.IPPROTO_TCP, getattr(socket, "TCP_USER_TIMEOUT", 0), round(1000 * _UNHEARD))]
        usual = urllib3.connection.HTTPConnection.default_socket_options
        keywords: dict[str, Any] = {"maxsize": connections, "ssl_context": context, "retries": False}
        keywords["socket_options"] = usual + [option for option in unheard if option[1]]
        if getattr(configuration, "tls_server_name", None):
            keywords["server_hostname"] = configuration.tls_server_name
        rest = import_module("kubernetes.client.rest")
        bypass = getattr(rest, "should_bypass_proxies", lambda url, no_proxy: False)
        if configuration.proxy and not bypass(self.url, configuration.no_proxy or ""):
            headers = configuration.proxy_headers
            self.pool: Any = urllib3.ProxyManager(configuration.proxy, proxy_headers=headers, **keywords)
        else:
            self.pool = urllib3.PoolManager(**keywords)

    def headers(self) -> dict[str, str]:
        import fiberexec

        headers = {"Accept": "application/json", "User-Agent": f"fiberexec/{fiberexec.__version__}"}
        bearer = self.configuration.auth_settings().get("BearerToken")
        if bearer:
            headers["Authorization"] = str(bearer["value"])
        elif self.configuration.username:
            headers["Authorization"] = self.configuration.get_basic_auth_token()
        return headers


class Api:
    """The server of a context, of KUBECONFIG, of the pod that this is, or of ~/.kube/config. Any thread may call."""

    def __init__(self, context: str | None, connections: int = 32) -> None:
        self._context = context
        self._connections = connections
        self._lock = threading.Lock()
        self._server: _Server | None = None
        self._renewed = 0.0
        self._namespace = ""
        self._closed = threading.Event()
        self.in_cluster = configurations.is_own(context)

    # -- configuration

    def server(self) -> _Server:
        with self._lock:
            if self._server is None:
                self._server = self._load()
            return self._server

    def namespace(self) -> str:
        """The namespace that the configuration names. Raises Setup."""
        self.server()
        return self._namespace

    def _load(self) -> _Server:
        self._renewed = time.monotonic()
        try:
            configuration, self._namespace = configurations.load(self._context)
            return _Server(configuration, self._connections)
        except Setup:
            raise
        except Exception as error:  # whatever a file, or the program that it names, can do wrong
            where = os.environ.get("KUBECONFIG") or "~/.kube/config"
            tried = "the service account of this pod" if self.in_cluster else where
            raise Setup(
                f"no Kubernetes configuration could be loaded ({tried}): {' '.join(str(error).split())}. What to do: set "
                "KUBECONFIG to the path of a kubeconfig (`kubectl config view` shows the current one), or run the program in "
                "a pod with a service account token"
            ) from error

    def _renew(self, old: _Server) -> bool:
        """Read the credentials again; whether they are others than those that ``old`` has."""
        with self._lock:
            if self._server is not old:
                return True
            if time.monotonic() < self._renewed + _RENEWED:
                return False
            try:
                self._server = self._load()
            except Setup as error:  # of a file that is being written, a login that is over: there may be others later
                _logger.debug("the credentials cannot be read again: %s", error)
                return False
            old.pool.clear()
            return True

    # -- calls

    def call(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None = None,
        body: Any = None,
        *,
        patience: float | None = None,
        read: float = _READ,
    ) -> Any:
        """One call; its answer. For ``patience`` seconds (30) it is made again while the server is busy or away.

        Raises ApiError and Setup.
        """
        seconds = PATIENCE if patience is None else patience
        response = self._patient(lambda: self._request(method, path, query, body, read, stream=False), seconds)
        if response.headers.get("Content-Type", "").startswith("application/json"):
            return json.loads(response.data)
        return response.data.decode("utf-8", "replace")

    def stream(self, path: str, query: Mapping[str, Any], read: float, patience: float = 0.0) -> Any:
        """The response, to be read piece by piece. Raises ApiError and Setup."""
        return self._patient(lambda: self._request("GET", path, query, None, read, stream=True), patience)

    def _patient(self, attempt: Callable[[], Any], patience: float) -> Any:
        import tenacity

        policy = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, ApiError) and error.passing),
            wait=wait_for_server,
            stop=tenacity.stop_any(tenacity.stop_before_delay(patience), tenacity.stop_when_event_set(self._closed)),
            sleep=tenacity.sleep_using_event(self._closed),
            reraise=True,
        )
        return policy(attempt)

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: Any,
        read: float,
        *,
        stream: bool,
        again: bool = True,
    ) -> Any:
        import urllib3

        server = self.server()
        url = server.url + path + ("?" + urlencode(query) if query else "")
        headers = server.headers()
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        try:
            response = server.pool.request(
                method,
                url,
                body=data,
                headers=headers,
                timeout=urllib3.Timeout(connect=_CONNECT, read=read),
                preload_content=not stream,
                redirect=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            if again and isinstance(error, urllib3.exceptions.SSLError) and self._renew(server):
                return self._request(method, path, query, body, read, stream=stream, again=False)
            raise ApiError(0, "", f"{type(error).__name__}: {' '.join(str(error).split())}", server.url) from error
        if response.status < 300:
            return response
        refusal = _refusal(response, server.url)
        if refusal.anonymous and again and self._renew(server):
            return self._request(method, path, query, body, read, stream=stream, again=False)
        raise refusal

    def close(self) -> None:
        """End every wait, and close what is not in use."""
        self._closed.set()
        with self._lock:
            if self._server is not None:
                self._server.pool.clear()

    # -- addresses

    def own_address(self) -> str:
        """The address that this pod has towards the server, and so towards others; "" for none."""
        return address_towards(urlsplit(self.server().url).hostname or "")


def wait_for_server(state: Any) -> float:
    """A wait of tenacity: what the server asks for, or an exponential one; either with jitter."""
    import tenacity

    jittered = float(tenacity.wait_random_exponential(multiplier=0.2, max=_LONGEST)(state))
    error = state.outcome.exception() if state.outcome is not None else None
    return jittered + (min(error.retry_after, _ASKED) if isinstance(error, ApiError) else 0.0)


def lines(response: Any) -> Iterator[bytes]:
    """The lines of a stream, as they come. Raises ApiError(0) when it breaks."""
    import urllib3

    try:
        for line in split(response.stream(1 << 16, decode_content=False)):
            yield line.removesuffix(b"\n")
    except (urllib3.exceptions.HTTPError, OSError, ValueError, AttributeError) as error:  # the last two by shut()
        raise ApiError(0, "", f"{type(error).__name__}: {error}", "") from error
    finally:
        shut(response)


def shut(response: Any) -> None:
    """End a stream. Any thread may, while another reads: closing alone would not wake it."""
    try:
        channel = response.connection.sock if response.connection is not None else response._fp.fp.raw._sock
        socket.socket.shutdown(channel, socket.SHUT_RDWR)  # not the TLS object's own, which is in use
    except (AttributeError, OSError):
        pass  # it has ended


def _refusal(response: Any, url: str) -> ApiError:
    data = response.data if response.data is not None else b""
    try:
        told = json.loads(data)
        reason, message = str(told.get("reason") or ""), str(told.get("message") or "")
        seconds = (told.get("details") or {}).get("retryAfterSeconds")
    except (ValueError, AttributeError):
        reason, message, seconds = "", data.decode("utf-8", "replace").strip()[:500], None
    after = response.headers.get("Retry-After", "") or str(seconds or "")
    wait = float(after) if after.isdecimal() else 0.0
    return ApiError(response.status, reason, message or f"HTTP {response.status} {response.reason or ''}".strip(), url, wait)
