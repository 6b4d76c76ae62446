"""Master keys: found by name in the environment or a folder, or behind a class of one's own; never shown."""

import base64
import os
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from elastrain.errors import SpecError, StorageError
from elastrain.keys import LocalKeys, check_key, check_name, key_service, named
from elastrain.spec.train import CheckpointSpec


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever keys whoever runs the tests has."""
    for name in [name for name in os.environ if name.startswith("ELASTRAIN_K")]:
        monkeypatch.delenv(name)


def text_of(length: int, fill: int = 7) -> str:
    return base64.b64encode(bytes([fill]) * length).decode()


def key_file(folder: Path, text: str, *, mode: int = 0o600) -> Path:
    path = folder / "main"
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("length", [16, 24, 32])
def test_a_key_opens_what_it_has_wrapped_wherever_it_is_found(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", text_of(length))
    check_key("main")
    wrapped = key_service().wrap(b"k" * 32, "main")
    monkeypatch.delenv("ELASTRAIN_KEY_MAIN")
    monkeypatch.setenv("ELASTRAIN_KEYS", str(tmp_path))
    key_file(tmp_path, text_of(length) + "\n", mode=0o400)
    assert key_service().unwrap(wrapped, "main") == b"k" * 32
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", text_of(length, 8))
    with pytest.raises(StorageError, match="it is another key, or the encrypted key was altered"):
        key_service().unwrap(wrapped, "main")  # the environment goes first


def test_wrapping_is_that_of_rfc_3394(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", base64.b64encode(bytes(range(32))).decode())
    data = bytes.fromhex("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F")
    expected = "28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21"  # its section 4.6
    assert base64.b64decode(LocalKeys().wrap(data, "main")).hex().upper() == expected
    wrapped = bytearray(bytes.fromhex(expected))
    for place in range(len(wrapped)):
        wrapped[place] ^= 1
        with pytest.raises(StorageError, match="altered"):
            LocalKeys().unwrap(base64.b64encode(wrapped).decode(), "main")
        wrapped[place] ^= 1


def test_a_key_that_is_not_there_or_no_key_is_one_sentence_without_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told() -> str:
        with pytest.raises(StorageError) as caught:
            check_key("main")
        return str(caught.value)

    assert told() == "no key 'main': set ELASTRAIN_KEY_MAIN, or ELASTRAIN_KEYS to a folder with a file main"
    monkeypatch.setenv("ELASTRAIN_KEYS", str(tmp_path))
    assert told() == f"no key 'main': there is no file {tmp_path}/main, and ELASTRAIN_KEY_MAIN is not set"
    for length in (0, 15, 31, 33, 64):
        key_file(tmp_path, text_of(length))
        assert f"{tmp_path}/main has {length} bytes where 16, 24 or 32 are needed" in told()
    (tmp_path / "main").write_bytes(b"hunter2 \xff\xfe")
    assert "is not base64; make one with: openssl rand -base64 32" in told()
    assert "hunter2" not in told()
    for mode in (0o640, 0o604, 0o620, 0o601):
        key_file(tmp_path, text_of(32), mode=mode)
        assert told().endswith(f"main may be used by others than its owner (mode {mode:04o}): chmod 600 it")
    (tmp_path / "main").unlink()
    (tmp_path / "main").mkdir()
    assert told() == f"cannot read the key file {tmp_path}/main: Is a directory"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_key_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTRAIN_KEYS", str(tmp_path))
    key_file(tmp_path, text_of(32), mode=0o000)
    with pytest.raises(StorageError, match=r"cannot read the key file .*: Permission denied"):
        check_key("main")


@pytest.mark.parametrize("name", ["", "Main", "a-b", "../etc/passwd", "1st", "a" * 64, text_of(32), "main\n"])
def test_what_cannot_be_a_name_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_name(name, where="--encrypt")
    assert str(caught.value).startswith("--encrypt: the name of a key is up to 63 small letters")
    assert not named(name)
    with pytest.raises(ValidationError, match="the name of a key is") as refused:
        CheckpointSpec(encrypt=name)
    assert len(name) < 9 or name not in refused.value.errors()[0]["msg"]


SERVICE = """
class Reversing:
    def wrap(self, key, name):
        return name + ":" + key[::-1].hex()

    def unwrap(self, wrapped, name):
        return bytes.fromhex(wrapped.removeprefix(name + ":"))[::-1]


class Broken(Reversing):
    def unwrap(self, wrapped, name):
        return bytes(32)
"""


def test_a_service_of_ones_own_is_asked_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "company_keys.py").write_text(SERVICE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ELASTRAIN_KMS", "company_keys:Reversing")
    check_key("main")
    assert key_service().wrap(b"\1\2", "main") == "main:0201"
    monkeypatch.setenv("ELASTRAIN_KMS", "company_keys:Broken")
    with pytest.raises(StorageError, match="did not give back the data key"):
        check_key("main")
    for wrong in ("company_keys:Nothing", "no_such_module:X", "company_keys", ":"):
        monkeypatch.setenv("ELASTRAIN_KMS", wrong)
        with pytest.raises(SpecError, match=r"no such class .*; give it as module:Class"):
            key_service()
    sys.modules.pop("company_keys")
