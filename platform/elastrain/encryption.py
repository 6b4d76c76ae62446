"""Files encrypted at rest, in pieces: nobody reads them without the key, and no byte of them changes unseen.

```
elastrain-encrypted 1
{"key": "main", "wrapped_key": "…", "salt": "…"}      one line of JSON
<1 MiB and a tag> <1 MiB and a tag> … <the rest, perhaps nothing, and a tag>
```
It is the construction of age (https://age-encryption.org/v1) with AES-256-GCM for its ChaCha20-Poly1305: a random data
key, wrapped by the master key; from it and a random salt a key for each file by HKDF-SHA-256; and the file in pieces
as in STREAM (Hoang, Reyhanitabar, Rogaway, Vizár, "Online Authenticated-Encryption and its Nonce-Reuse
Misuse-Resistance", 2015). A piece's nonce is its number and whether it is the last one, so pieces cannot be moved,
repeated or cut off. Header and `context`, which says what the file is, are authenticated with each piece: a file that
is put in another one's place does not open. All primitives are those of the library `cryptography`.
"""

import base64
import json
import os
from collections.abc import Iterator
from typing import Any

from elastrain.errors import StorageError
from elastrain.keys import key_service, named

MAGIC = b"elastrain-encrypted 1\n"
PIECE_BYTES = 1 << 20
TAG_BYTES = 16
ALTERED = "corrupted (not the bytes that were encrypted)"
PURPOSE = b"elastrain encrypted file"


class Encryptor:
    """Encrypts files under a data key that the master key `name` wraps once; raises StorageError without it."""

    def __init__(self, name: str) -> None:
        self._name, self._key = name, os.urandom(32)
        self._wrapped = key_service().wrap(self._key, name)

    def pieces(self, data: bytes | memoryview, *, context: str) -> Iterator[bytes]:
        """Yield the bytes of an encrypted file that holds `data`, piece by piece."""
        salt = os.urandom(16)
        fields = {"key": self._name, "wrapped_key": self._wrapped, "salt": base64.b64encode(salt).decode()}
        header = MAGIC + json.dumps(fields).encode() + b"\n"
        yield header
        cipher, bound, view = _cipher(self._key, salt), header + context.encode(), memoryview(data)
        for number, (start, last) in enumerate(_cuts(len(view), PIECE_BYTES)):
            yield cipher.encrypt(_nonce(number, last=last), view[start : start + PIECE_BYTES], bound)

    def encrypt(self, data: bytes, *, context: str) -> bytes:
        """Return the bytes of an encrypted file that holds `data`."""
        return b"".join(self.pieces(data, context=context))


def is_encrypted(data: bytes) -> bool:
    """Say whether these are the bytes of an encrypted file, or the first of them."""
    return data.startswith(MAGIC)


def decrypt(data: bytes, *, context: str, where: str) -> bytes:
    """Return what an encrypted file holds; `where` is how a missing key names it.

    Raises StorageError if the key is not there or another one, ValueError if any byte is not the one that was written.
    """
    from cryptography.exceptions import InvalidTag  # noqa: PLC0415 -- for who encrypts only

    header, fields = _header(data)
    try:
        key = key_service().unwrap(str(fields["wrapped_key"]), str(fields["key"]))
    except StorageError as error:
        raise StorageError(f"{where} is encrypted: {error}") from error
    bound, view, found = header + context.encode(), memoryview(data)[len(header) :], []
    try:
        cipher = _cipher(key, base64.b64decode(fields["salt"]))
        for number, (start, last) in enumerate(_cuts(len(view), PIECE_BYTES + TAG_BYTES)):
            piece = view[start : start + PIECE_BYTES + TAG_BYTES]
            found.append(cipher.decrypt(_nonce(number, last=last), piece, bound))
    except (InvalidTag, ValueError, TypeError) as error:  # or shorter than a tag, or a salt that is no base64
        raise ValueError(ALTERED) from error
    return b"".join(found)


def _header(data: bytes) -> tuple[bytes, dict[str, Any]]:
    end = data.find(b"\n", len(MAGIC)) + 1
    try:
        fields = json.loads(data[len(MAGIC) : end])
        if not is_encrypted(data) or set(fields) != {"key", "wrapped_key", "salt"} or not named(fields["key"]):
            raise ValueError("no header")
    except (ValueError, TypeError) as error:
        raise ValueError(ALTERED) from error
    return data[:end], fields


def _cipher(key: bytes, salt: bytes) -> Any:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415

    return AESGCM(HKDF(algorithm=SHA256(), length=32, salt=salt, info=PURPOSE).derive(key))


def _nonce(number: int, *, last: bool) -> bytes:
    return number.to_bytes(11, "big") + bytes([last])


def _cuts(size: int, piece: int) -> Iterator[tuple[int, bool]]:
    """Yield where each piece begins, and whether it is the last; there is one at least."""
    for start in range(0, max(size, 1), piece):
        yield start, start + piece >= size
