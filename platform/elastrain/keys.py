"""Master keys by name, and what is done with one: a data key is wrapped by it, and unwrapped again.

A master key never leaves its service, and a service is found by name: in specs, manifests and files stand names and
wrapped keys only. By itself Elastrain looks into the environment, then into a folder:

```
ELASTRAIN_KEY_MAIN=<base64 of 16, 24 or 32 bytes>    the key `main`
ELASTRAIN_KEYS=/etc/elastrain/keys                   a folder with one such text in a file for each key, mode 0600
ELASTRAIN_KMS=company.keys:Service                   a class of your own instead of both: a `KeyService`
```
"""

import base64
import binascii
import importlib
import os
import re
import stat
from pathlib import Path
from typing import Protocol

from elastrain.errors import SpecError, StorageError

NAME = r"^[a-z][a-z0-9_]{0,62}$"  # so that each name has a variable of its own
VARIABLE, FOLDER, SERVICE = "ELASTRAIN_KEY_", "ELASTRAIN_KEYS", "ELASTRAIN_KMS"
KEY_NAMES = "the name of a key is up to 63 small letters, digits and underscores, and begins with a letter"
LENGTHS = (16, 24, 32)
OTHERS = stat.S_IRWXG | stat.S_IRWXO


class KeyService(Protocol):
    """What wraps data keys: one of the two here, or a client of Vault, a cloud's service or a hardware module."""

    def wrap(self, key: bytes, name: str) -> str:
        """Return a data key as text that only the master key `name` opens again; raises StorageError."""

    def unwrap(self, wrapped: str, name: str) -> bytes:
        """Return the data key that was wrapped; raises StorageError if the master key is not there or another one."""


class LocalKeys:
    """Master keys from the environment or a folder; data keys are wrapped as RFC 3394 says (AES key wrap)."""

    def wrap(self, key: bytes, name: str) -> str:
        """See `KeyService.wrap`."""
        from cryptography.hazmat.primitives.keywrap import aes_key_wrap  # noqa: PLC0415 -- for who encrypts only

        return base64.b64encode(aes_key_wrap(_master_key(name), key)).decode()

    def unwrap(self, wrapped: str, name: str) -> bytes:
        """See `KeyService.unwrap`."""
        from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap  # noqa: PLC0415

        try:
            return aes_key_unwrap(_master_key(name), base64.b64decode(wrapped, validate=True))
        except (InvalidUnwrap, binascii.Error):
            raise StorageError(
                f"the key {name!r} does not open what was encrypted with a key of this name: it is another key, or "
                f"the encrypted key was altered; give the key that was used then"
            ) from None


def key_service() -> KeyService:
    """Return the service that `ELASTRAIN_KMS` names, else the keys of environment and folder; raises SpecError."""
    name = os.environ.get(SERVICE)
    if not name:
        return LocalKeys()
    module, _, attribute = name.partition(":")
    try:
        service: KeyService = getattr(importlib.import_module(module), attribute)()
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(f"{SERVICE}={name}: no such class ({error}); give it as module:Class") from error
    return service


def named(name: str) -> bool:
    """Say whether this can be the name of a key.

    >>> named("main"), named("Main"), named("c2VjcmV0")
    (True, False, False)
    """
    return re.fullmatch(NAME, name) is not None


def check_name(name: str, *, where: str) -> None:
    """Raise SpecError if `name` cannot be the name of a key; what was given is not repeated, it might be a key."""
    if not named(name):
        raise SpecError(f"{where}: {KEY_NAMES}")


def check_key(name: str) -> None:
    """Raise StorageError unless the key is there and opens what it has wrapped."""
    service, data_key = key_service(), os.urandom(32)
    if service.unwrap(service.wrap(data_key, name), name) != data_key:
        raise StorageError(f"the key {name!r}: the key service did not give back the data key that it had wrapped")


def _master_key(name: str) -> bytes:
    """Return a key from the environment, which goes first, or from the folder; raises StorageError."""
    check_name(name, where="encryption")
    variable, folder = VARIABLE + name.upper(), os.environ.get(FOLDER)
    if os.environ.get(variable):
        return _decoded(os.environ[variable], name, variable)
    if not folder:
        raise StorageError(f"no key {name!r}: set {variable}, or {FOLDER} to a folder with a file {name}")
    path = Path(folder) / name
    try:
        with path.open("rb") as file:  # looked at while it is open, so that it is the file that is read
            mode = os.fstat(file.fileno()).st_mode
            if mode & OTHERS:
                raise StorageError(
                    f"the key file {path} may be used by others than its owner (mode {mode & 0o777:04o}): chmod 600 it"
                )
            text = file.read().decode("ascii", errors="replace")
    except FileNotFoundError:
        raise StorageError(f"no key {name!r}: there is no file {path}, and {variable} is not set") from None
    except OSError as error:
        raise StorageError(f"cannot read the key file {path}: {os.strerror(error.errno or 0)}") from None
    return _decoded(text, name, str(path))


def _decoded(text: str, name: str, where: str) -> bytes:
    try:
        key = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        raise StorageError(
            f"the key {name!r} in {where} is not base64; make one with: openssl rand -base64 32"
        ) from None
    if len(key) not in LENGTHS:
        raise StorageError(
            f"the key {name!r} in {where} has {len(key)} bytes where 16, 24 or 32 are needed; make one with: "
            f"openssl rand -base64 32"
        )
    return key
