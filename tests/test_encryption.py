"""Encrypted files: what went in comes out, nothing else does, and nobody reads them without the key."""

import base64
import json
import os

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import aes_key_unwrap

from elastrain import encryption
from elastrain.encryption import MAGIC, PIECE_BYTES, TAG_BYTES, Encryptor, decrypt, is_encrypted
from elastrain.errors import StorageError

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELASTRAIN_KMS", raising=False)
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", base64.b64encode(KEY).decode())


def opened(data: bytes, context: str = "here") -> bytes:
    return decrypt(data, context=context, where="the file")


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 200, 350])
def test_what_went_in_comes_out_at_any_size(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "PIECE_BYTES", 100)
    data = os.urandom(size)
    held = Encryptor("main").encrypt(data, context="here")
    assert is_encrypted(held)
    assert opened(held) == data
    for length in range(len(held)):  # cut off anywhere
        with pytest.raises(ValueError, match="corrupted"):
            opened(held[:length])
    with pytest.raises(ValueError, match="corrupted"):
        opened(held + bytes(17))


def test_a_large_file_is_cut_into_pieces_of_a_mebibyte() -> None:
    data = os.urandom(2 * PIECE_BYTES + 5)
    pieces = list(Encryptor("main").pieces(data, context="here"))
    assert [len(piece) for piece in pieces[1:]] == [PIECE_BYTES + TAG_BYTES] * 2 + [5 + TAG_BYTES]
    assert opened(b"".join(pieces)) == data
    assert data[:64] not in b"".join(pieces)


def test_every_flipped_bit_is_found() -> None:
    held = bytearray(Encryptor("main").encrypt(os.urandom(40), context="here"))
    for place in range(len(held) * 8):
        held[place // 8] ^= 1 << place % 8
        with pytest.raises((ValueError, StorageError)):
            opened(bytes(held))
        held[place // 8] ^= 1 << place % 8
    assert len(opened(bytes(held))) == 40


def test_pieces_cannot_be_moved_repeated_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encryption, "PIECE_BYTES", 100)
    header, *pieces = Encryptor("main").pieces(os.urandom(400), context="here")
    assert len(pieces) == 4
    for order in ((1, 0, 2, 3), (0, 1, 3), (0, 1, 2), (0, 0, 1, 2, 3), (3,), (0, 1, 2, 2), ()):
        with pytest.raises(ValueError, match="corrupted"):
            opened(header + b"".join(pieces[place] for place in order))


def test_a_file_opens_only_in_its_own_place_and_with_its_own_header() -> None:
    encryptor = Encryptor("main")
    one, other = (encryptor.encrypt(b"data", context="here") for _ in range(2))
    assert one != other
    with pytest.raises(ValueError, match="corrupted"):
        opened(one, context="there")
    end = one.index(b"\n", len(MAGIC)) + 1
    assert one[:end] != other[:end], "a salt of its own"
    with pytest.raises(ValueError, match="corrupted"):
        opened(one[:end] + other[end:])


def test_without_the_key_or_with_another_one_nothing_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    held = Encryptor("main").encrypt(b"data", context="here")
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", base64.b64encode(bytes(32)).decode())
    with pytest.raises(StorageError, match="the file is encrypted: the key 'main' does not open"):
        opened(held)
    monkeypatch.delenv("ELASTRAIN_KEY_MAIN")
    with pytest.raises(StorageError, match="the file is encrypted: no key 'main': set ELASTRAIN_KEY_MAIN"):
        opened(held)
    with pytest.raises(StorageError, match="no key 'main'"):
        Encryptor("main")


def test_the_bytes_are_what_the_module_says_they_are() -> None:
    """By hand, with nothing of ours: what was encrypted can be read for ever."""
    data = os.urandom(PIECE_BYTES + 3)
    magic, header, body = Encryptor("main").encrypt(data, context="here").split(b"\n", 2)
    fields = json.loads(header)
    assert (magic, fields["key"]) == (b"elastrain-encrypted 1", "main")
    data_key = aes_key_unwrap(KEY, base64.b64decode(fields["wrapped_key"]))
    salt = base64.b64decode(fields["salt"])
    assert (len(data_key), len(salt)) == (32, 16)
    hkdf = HKDF(algorithm=SHA256(), length=32, salt=salt, info=b"elastrain encrypted file")
    cipher, bound = AESGCM(hkdf.derive(data_key)), magic + b"\n" + header + b"\n" + b"here"
    first, rest = body[: PIECE_BYTES + 16], body[PIECE_BYTES + 16 :]
    assert cipher.decrypt(bytes(11) + b"\0", first, bound) == data[:PIECE_BYTES]
    assert cipher.decrypt(bytes(10) + b"\1\1", rest, bound) == data[PIECE_BYTES:]
