"""Master keys that never leave a Vault server, or OpenBao: its transit engine wraps and unwraps data keys.

`ELASTRAIN_KMS=elastrain.vault:Transit` chooses it; where the server is and who asks is said as for its own commands:
`VAULT_ADDR`, `VAULT_TOKEN` or the file `~/.vault-token`, `VAULT_NAMESPACE`, `VAULT_CACERT`. A key of the engine at
`transit/` with the name that the spec gives has to be there: `vault write -f transit/keys/main`.
"""

import base64
import binascii
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from elastrain.errors import StorageError

ANSWER_S = 15.0
ATTEMPTS = 4
HERE = ("127.0.0.1", "::1", "localhost")


class Transit:
    """A `keys.KeyService`: what it wraps is Vault's own text, which tells the version of the key."""

    def wrap(self, key: bytes, name: str) -> str:
        """See `keys.KeyService.wrap`."""
        return str(_asked("encrypt", name, "plaintext", base64.b64encode(key).decode(), "ciphertext"))

    def unwrap(self, wrapped: str, name: str) -> bytes:
        """See `keys.KeyService.unwrap`."""
        try:
            return base64.b64decode(_asked("decrypt", name, "ciphertext", wrapped, "plaintext"), validate=True)
        except binascii.Error:
            raise StorageError(f"the key {name!r}: Vault gave back what is not base64; check VAULT_ADDR") from None


def _asked(verb: str, name: str, field: str, value: str, wanted: str) -> str:
    """Ask the engine, again while what is wrong may pass; raises StorageError."""
    where, request = _request(verb, name, {field: value})
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S, context=_trust(where)) as answer:  # noqa: S310
                return str(json.load(answer)["data"][wanted])
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500 or attempt == ATTEMPTS - 1:
                raise StorageError(_reason(error.code, verb, name, where)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if attempt == ATTEMPTS - 1:
                raise StorageError(
                    f"the key {name!r}: no proper answer from {where} ({type(error).__name__}); check VAULT_ADDR and "
                    f"VAULT_CACERT"
                ) from None
        time.sleep(0.2 * 4**attempt)
    raise AssertionError("unreachable")


def _request(verb: str, name: str, body: dict[str, Any]) -> tuple[str, urllib.request.Request]:
    where = os.environ.get("VAULT_ADDR", "").rstrip("/")
    parts = urlsplit(where)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise StorageError(f"the key {name!r}: set VAULT_ADDR to the server, as https://host:8200, without credentials")
    if parts.scheme == "http" and parts.hostname not in HERE:
        raise StorageError(f"the key {name!r}: VAULT_ADDR is {where}: unencrypted; data keys need https")
    headers = {"X-Vault-Token": _token(name), "X-Vault-Request": "true", "Content-Type": "application/json"}
    if namespace := os.environ.get("VAULT_NAMESPACE"):
        headers["X-Vault-Namespace"] = namespace
    url = f"{where}/v1/transit/{verb}/{name}"
    return where, urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")  # noqa: S310


def _token(name: str) -> str:
    if token := os.environ.get("VAULT_TOKEN"):
        return token.strip()
    try:
        return (Path.home() / ".vault-token").read_text().strip()
    except (OSError, UnicodeDecodeError):
        raise StorageError(f"the key {name!r}: set VAULT_TOKEN, or log in with `vault login`") from None


def _trust(where: str) -> ssl.SSLContext | None:
    return ssl.create_default_context(cafile=os.environ.get("VAULT_CACERT")) if where.startswith("https") else None


def _reason(status: int, verb: str, name: str, where: str) -> str:
    """Return what an answer means; what it says itself may repeat what was sent, and is left out."""
    known = {
        400: f"Vault does not {verb} with it: there is no such key, or it is another one, or the text was altered",
        403: f"permission denied: the token of VAULT_TOKEN has expired, or may not update transit/{verb}/{name}",
        404: "there is no transit engine at transit/; enable it, or check VAULT_ADDR and VAULT_NAMESPACE",
        503: "Vault is sealed or down: unseal it",
    }
    return f"the key {name!r} at {where}: {known.get(status, f'HTTP status {status}; look at its log')}"
