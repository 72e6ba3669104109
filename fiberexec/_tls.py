"""Keys and certificates of one program, for the links between its hub and its agents.

The driver makes an authority, which signs a certificate for the hub and one for each agent. All live in memory
and end with the program; no key is ever written to a file here. Who holds a certificate of another program, or
an agent's where the hub's is expected, is refused by the handshake.
"""

from __future__ import annotations

import datetime
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import CertificateBuilder, KeyUsage, Name

_BEFORE = datetime.timedelta(days=1)  # clocks of other hosts may be behind, and time zones wrong
_AFTER = datetime.timedelta(days=3652)  # what ends a key is the end of its program
LONGEST = 64  # characters of a name: a limit of X.509


class Authority:
    """What signs a program's certificates: a key of its own (EC P-256), made anew with each object, and never shown.

    ``ca`` is its certificate (PEM), which each side of a link needs to check the other. An authority is neither
    pickled nor written anywhere.
    """

    ca: str

    def __init__(self) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec

        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"fiberexec {os.urandom(8).hex()}")
        usage = _usage(key_cert_sign=True, crl_sign=True)
        builder = (
            _builder(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
        )
        self.ca = _signed(builder, self._key)

    def certificate(self, name: str, server: bool = False) -> tuple[str, str]:
        """A new key and the certificate for it: (certificate, key), both PEM; the key is not encrypted.

        Parameters
        ----------
        name:
            Its common name and its only DNS name: 1 to 64 letters, digits, hyphens and dots.
        server:
            Whether the holder may accept connections, rather than make them (the default). Never both.

        Raises
        ------
        ValueError
            `name` is empty, longer than 64 characters, or not ASCII.
        """
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        if not 1 <= len(name) <= LONGEST:
            raise ValueError(f"a certificate's name has 1 to {LONGEST} characters, not {len(name)}: {name!r}")
        use = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        key = ec.generate_private_key(ec.SECP256R1())
        builder = (
            _builder(_name(name), self._name, key)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([use]), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        return _signed(builder, self._key), pem.decode("ascii")

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("an Authority holds the key of its program and does not travel: send certificates that it made")


def _name(common_name: str) -> Name:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])


def _validity() -> tuple[datetime.datetime, datetime.datetime]:
    now = datetime.datetime.now(datetime.timezone.utc)
    return now - _BEFORE, now + _AFTER


def _builder(subject: Name, issuer: Name, key: EllipticCurvePrivateKey) -> CertificateBuilder:
    from cryptography import x509

    begin, end = _validity()
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(**which: bool) -> KeyUsage:
    from cryptography import x509

    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{name: which.get(name, False) for name in names})


def _signed(builder: CertificateBuilder, key: EllipticCurvePrivateKey) -> str:
    from cryptography.hazmat.primitives import hashes, serialization

    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode("ascii")
