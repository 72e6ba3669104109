"""Whom a program's certificates let in, and whom they keep out."""

from __future__ import annotations

import datetime
import json
import os
import pickle
import ssl
import subprocess
import sys
from typing import Any

import pytest

from fiberexec import _tls
from fiberexec._tls import Authority

HUB, AGENT = "hub", "p1-1"

# A process of its own, because one that has opened an nng socket must not fork. Reads cases, prints verdicts. It ends as hubs
# and agents do, with its sockets open: nng may crash when it closes one whose connections are ending.
PROBE = """
import json, os, socket, sys
import pynng
from fiberexec._link import _secured

opened = []

def attempt(server, client, name):
    names = []
    def joined(pipe):
        out = pynng._nng.ffi.new("char **")
        error = pynng._nng.lib.nng_pipe_get_string(pipe.pipe, b"tls-peer-cn", out)
        names.append("" if error else pynng._nng.ffi.string(out[0]).decode())
    rep = pynng.Rep0(recv_timeout=LIMIT)
    opened.append(rep)
    rep.add_post_pipe_connect_cb(joined)
    rep.tls_config = _secured(pynng.TLSConfig.MODE_SERVER, server[2], server[0], server[1])
    rep.listen("tls+tcp://127.0.0.1:0")
    address = rep.listeners[0].local_address
    port = int.from_bytes(address.port.to_bytes(2, sys.byteorder), "big")
    if client == "plain":
        with socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(b"\\0SP\\0\\0\\x30\\0\\0")
            try:
                while data := sock.recv(100):
                    if b"SP" in data:
                        return ["in", names]
            except ConnectionResetError:
                pass
        return ["refused", names]
    req = pynng.Req0(recv_timeout=LIMIT, send_timeout=LIMIT)
    opened.append(req)
    req.tls_config = _secured(pynng.TLSConfig.MODE_CLIENT, client[2], client[0], client[1], name)
    try:
        req.dial(f"tls+tcp://127.0.0.1:{port}", block=True)
        req.send(b"?")
        rep.recv()
        rep.send(b"!")
        return ["in" if req.recv() == b"!" else "?", names]
    except pynng.NNGException as error:
        return ["refused", names, str(error)]

LIMIT = 2000
print(json.dumps({case: attempt(*sides) for case, sides in json.load(sys.stdin).items()}), flush=True)
os._exit(0)
"""


def cases() -> dict[str, Any]:
    authority, stranger = Authority(), Authority()
    hub = [*authority.certificate(HUB, server=True), authority.ca]
    agent = [*authority.certificate(AGENT), authority.ca]
    agents_hub = [*authority.certificate(HUB), authority.ca]
    strange_agent = [*stranger.certificate(AGENT), authority.ca]
    strange_hub = [*stranger.certificate(HUB, server=True), authority.ca]
    now = datetime.datetime.now(datetime.timezone.utc)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tls, "_validity", lambda: (now - datetime.timedelta(days=2), now - datetime.timedelta(minutes=1)))
        old_agent = [*authority.certificate(AGENT), authority.ca]
        old_hub = [*authority.certificate(HUB, server=True), authority.ca]
    return {
        "good": (hub, agent, HUB),
        "agent: no certificate": (hub, [None, None, authority.ca], HUB),
        "agent: another program's": (hub, strange_agent, HUB),
        "agent: expired": (hub, old_agent, HUB),
        "agent: a hub's": (hub, hub, HUB),
        "agent: plain TCP": (hub, "plain", HUB),
        "hub: another program's": (strange_hub, agent, HUB),
        "hub: expired": (old_hub, agent, HUB),
        "hub: an agent's": (agents_hub, agent, HUB),
        "hub: wrong name": (hub, agent, "another"),
    }


CASES = (
    "agent: no certificate", "agent: another program's", "agent: expired", "agent: a hub's", "agent: plain TCP",
    "hub: another program's", "hub: expired", "hub: an agent's", "hub: wrong name",
)  # fmt: skip


@pytest.fixture(scope="module")
def verdicts() -> Any:
    pytest.importorskip("pynng")
    done = subprocess.run(
        [sys.executable, "-c", PROBE], input=json.dumps(cases()), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_an_agent_of_the_program_gets_in_and_the_hub_reads_its_name(verdicts: Any) -> None:
    assert verdicts["good"] == ["in", [AGENT]]


@pytest.mark.parametrize("case", CASES)
def test_nng_refuses(verdicts: Any, case: str) -> None:
    assert verdicts[case][:2] == ["refused", []], verdicts[case]


def test_every_case_is_asked_for(verdicts: Any) -> None:
    assert {"good", *CASES} == set(verdicts)


# -- the same by OpenSSL, which is the stricter and says why


def context(server: bool, keys: Any, folder: Any) -> ssl.SSLContext:
    certificate, key, ca = keys
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    made.verify_mode = ssl.CERT_REQUIRED
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(cadata=ca)
    path = folder / f"{os.urandom(4).hex()}.pem"
    path.write_text(certificate + key)  # of this test alone: the module itself writes none
    made.load_cert_chain(path)
    return made


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    one = server.wrap_bio(up, down, server_side=True)
    two = client.wrap_bio(down, up, server_hostname=name)
    for _ in range(4):
        for side in two, one:
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
    return one, two


@pytest.mark.parametrize(
    "case, says",
    [
        ("agent: another program's", "signature failure|unable to get|self.signed|issuer"),
        ("agent: expired", "expired"),
        ("agent: a hub's", "purpose"),
        ("hub: another program's", "signature failure|unable to get|self.signed|issuer"),
        ("hub: expired", "expired"),
        ("hub: an agent's", "purpose"),
        ("hub: wrong name", "[Hh]ostname mismatch"),
    ],
)
def test_openssl_refuses_too_and_for_this_reason(case: str, says: str, tmp_path: Any) -> None:
    server, client, name = cases()[case]
    with pytest.raises(ssl.SSLCertVerificationError, match=says):
        shake(context(True, server, tmp_path), context(False, client, tmp_path), name)


def test_openssl_at_its_strictest_accepts_the_good_pair(tmp_path: Any) -> None:
    server, client, name = cases()["good"]
    one, _ = shake(context(True, server, tmp_path), context(False, client, tmp_path), name)
    peer: Any = one.getpeercert()
    assert peer["subject"] == ((("commonName", AGENT),),)
    assert peer["subjectAltName"] == (("DNS", AGENT),)


# -- what is made


def test_a_certificate_is_valid_from_yesterday_for_ten_years() -> None:
    from cryptography import x509

    authority = Authority()
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    for pem in authority.ca, authority.certificate("a")[0], authority.certificate("b", server=True)[0]:
        made = x509.load_pem_x509_certificate(pem.encode())
        begin, end = (value.replace(tzinfo=None) for value in (made.not_valid_before_utc, made.not_valid_after_utc))
        assert datetime.timedelta(hours=23) < now - begin < datetime.timedelta(hours=25)
        assert 3650 <= (end - now).days <= 3652


def test_each_key_is_new() -> None:
    authority = Authority()
    made = [authority.certificate("same") for _ in range(3)]
    assert len({key for _, key in made}) == 3
    assert Authority().ca != Authority().ca


def test_an_authority_does_not_travel_and_does_not_show_its_key() -> None:
    authority = Authority()
    with pytest.raises(TypeError, match="does not travel"):
        pickle.dumps(authority)
    assert "PRIVATE" not in repr(authority) + authority.ca


@pytest.mark.parametrize("name", ["", "x" * 65, "ä"])
def test_a_name_that_no_certificate_can_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        Authority().certificate(name)


def test_making_them_writes_no_file() -> None:
    code = """
import sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(args))
from fiberexec._tls import Authority
Authority().certificate("a")
import os
writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT
print([a for a in opened if (isinstance(a[1], str) and set(a[1]) & set("wax+")) or (a[2] or 0) & writing])
"""
    done = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_importing_it_does_not_import_cryptography() -> None:
    code = "import sys, fiberexec._tls; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr
