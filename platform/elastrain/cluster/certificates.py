"""Certificates for TLS: a cluster's own authority, and from it one for each machine, in a folder.

```
ca.crt  ca.key      the authority, made once: who has the key can join the cluster
node.crt  node.key  a machine's, made anew each time, for the addresses of this one and those that are given
```
Ray asks both sides for a certificate of the authority, and the one that answers for the address that it was called by.
"""

import datetime
import os
import socket
from collections.abc import Iterable
from ipaddress import ip_address
from itertools import pairwise
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from elastrain.cluster.environment import tls_variables
from elastrain.errors import SpecError, StorageError

DAYS, AUTHORITY_DAYS = 365, 3650
BEFORE = datetime.timedelta(minutes=10)  # other machines' clocks may be behind
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def make_certificates(
    folder: str, hosts: Iterable[str] = (), *, out: str | None = None, days: int = DAYS
) -> dict[str, Any]:
    """Make the authority where `folder` has none, and in `out`, or there, a certificate for this machine and `hosts`.

    Returns the folder, the hosts, the day of the end and the variables that Ray wants. Raises SpecError for a host that
    is none, StorageError if a folder cannot be written or the authority cannot be read.
    """
    names = sorted({*LOOPBACK, *own_hosts(), *hosts})
    alternatives = [_alternative(name) for name in names]
    place = Path(out or folder).expanduser().absolute()
    try:
        authority, signer = _authority(Path(folder).expanduser().absolute())
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        end = _now() + datetime.timedelta(days=days)
        made = (
            _begun("elastrain node", key, authority.subject, end)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage(_BOTH_SIDES), critical=False)
            .sign(signer, hashes.SHA256())
        )
        _replace(place / "node.key", _key_text(key))
        _replace(place / "node.crt", made.public_bytes(serialization.Encoding.PEM))
        _replace(place / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
    except OSError as error:
        raise StorageError(f"{place}: cannot be written: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise StorageError(f"{place}: its authority cannot be read ({error}); restore ca.crt and ca.key") from None
    return {"folder": str(place), "hosts": names, "until": f"{end:%Y-%m-%d}", "environment": tls_variables(str(place))}


def own_hosts() -> set[str]:
    """Return by what names and addresses this machine may be called: its host name, and what its interfaces have."""
    try:
        lines = Path("/proc/net/fib_trie").read_text().splitlines()
    except OSError:
        lines = []
    local = {before.split()[-1] for before, line in pairwise(lines) if "host LOCAL" in line}
    return {socket.gethostname(), *(each for each in local if not each.startswith("127."))}


_BOTH_SIDES = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]


def _authority(place: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """Return the folder's authority and its key, made where there is none."""
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not (place / "ca.key").exists() and not (place / "ca.crt").exists():
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("elastrain authority")
        made = (
            _begun("elastrain authority", key, name, _now() + datetime.timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_SIGNS, critical=True)
            .sign(key, hashes.SHA256())
        )
        _replace(place / "ca.key", _key_text(key))
        _replace(place / "ca.crt", made.public_bytes(serialization.Encoding.PEM))
    found = serialization.load_pem_private_key((place / "ca.key").read_bytes(), None)
    if not isinstance(found, ec.EllipticCurvePrivateKey):
        raise TypeError("ca.key is no key of ours")
    return x509.load_pem_x509_certificate((place / "ca.crt").read_bytes()), found


_SIGNS = x509.KeyUsage(
    **dict.fromkeys(("key_cert_sign", "crl_sign"), True),
    **dict.fromkeys(("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"), False),
    **dict.fromkeys(("key_agreement", "encipher_only", "decipher_only"), False),
)


def _begun(
    subject: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - BEFORE)
        .not_valid_after(end)
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    if not host or not all(part and part.replace("-", "").isalnum() and part.isascii() for part in host.split(".")):
        raise SpecError(f"{host!r} is no address and no name of a host")
    return x509.DNSName(host)


def _key_text(key: ec.EllipticCurvePrivateKey) -> bytes:
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, none)


def _replace(path: Path, data: bytes) -> None:
    """Write a file that its owner alone can read, whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    scratch.touch(mode=0o600, exist_ok=False)
    scratch.write_bytes(data)
    scratch.replace(path)
