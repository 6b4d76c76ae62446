"""Where the keys for S3 come from, for clients that look nowhere by themselves."""

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from elastrain.credentials import FRESH_S, find_keys, for_obstore
from elastrain.errors import StorageError

VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder with both files, neither of which is there, and no `aws` anywhere."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


def found() -> tuple[str, str, str | None] | None:
    keys = find_keys()
    return None if keys is None else (keys.key_id, keys.secret, keys.token)


def script(path: Path, said: str, code: int = 0) -> str:
    """Write a program that prints and ends."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport sys\nprint({said!r})\nsys.exit({code})\n")
    path.chmod(0o755)
    return str(path)


def test_the_environment_goes_before_the_files_and_keys_before_configuration(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found() is None, "then it is the machine's role, if anything"
    (files / "config").write_text(
        "[default]\naws_access_key_id = c\naws_secret_access_key = d\n[profile work]\nregion = x\n"
    )
    assert found() == ("c", "d", None)
    text = "[default]\naws_access_key_id=a\naws_secret_access_key=b%\n[work]\naws_access_key_id=e\n"
    (files / "credentials").write_text(f"{text}aws_secret_access_key=f\naws_session_token=g\n")
    assert found() == ("a", "b%", None)
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert found() == ("e", "f", "g")
    assert for_obstore()["token"] == "g"  # noqa: S105 -- of a test
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "h")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "i")
    assert found() == ("h", "i", None)


def test_a_command_of_the_profile_is_run_and_asked_again_before_its_keys_expire(files: Path) -> None:
    expires = datetime.fromtimestamp(int(time.time()) + 900, UTC)
    said = {"Version": 1, "AccessKeyId": "a", "SecretAccessKey": "b", "SessionToken": "c"}
    program = script(files / "with space" / "keys", json.dumps({**said, "Expiration": expires.isoformat()}))
    (files / "config").write_text(f"[default]\ncredential_process = '{program}' --for work\n")
    assert found() == ("a", "b", "c")
    assert for_obstore()["expires_at"] == expires
    script(files / "with space" / "keys", json.dumps({**said, "Expiration": "2020-01-01T00:00:00Z"[:-1] + "Z"}))
    assert find_keys() is not None
    script(files / "with space" / "keys", json.dumps(said))
    keys = find_keys()
    assert keys is not None
    assert 0 < keys.until - time.time() <= FRESH_S


@pytest.mark.parametrize(("said", "code"), [("{}", 0), ("hidden", 0), ('{"AccessKeyId": "hidden"}', 1), ("[1]", 0)])
def test_a_command_that_fails_is_one_sentence_without_what_it_printed(said: str, code: int, files: Path) -> None:
    (files / "config").write_text(f"[default]\ncredential_process = {script(files / 'bin' / 'keys', said, code)}\n")
    with pytest.raises(
        StorageError, match=r"^the profile 'default' gives no keys: keys failed .*; run it by"
    ) as caught:
        find_keys()
    assert "hidden" not in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_single_sign_on_is_asked_for_through_the_command_line_of_aws(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (files / "config").write_text("[profile sso]\nsso_session = x\n[profile role]\nrole_arn = y\nsource_profile = z\n")
    monkeypatch.setenv("AWS_PROFILE", "sso")
    with pytest.raises(StorageError, match=r"AWS_PROFILE is sso, which holds no keys .* export-credentials"):
        find_keys()
    script(files / "bin" / "aws", json.dumps({"AccessKeyId": "a", "SecretAccessKey": "b"}))
    assert found() == ("a", "b", None)
    monkeypatch.setenv("AWS_PROFILE", "role")
    with pytest.raises(
        StorageError,
        match=r"AWS_PROFILE is role, which is a role to be assumed .role_arn.: put keys into .* export-credentials",
    ):
        find_keys()
