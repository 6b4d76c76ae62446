"""The keys for S3 as environment and files name them, for clients that do not look there by themselves.

They are looked for where the SDK looks, in its order: environment, the profile's keys in the files of credentials and
of configuration, the command that the profile names (`credential_process`). A profile with neither, that of a single
sign-on, is asked for through the AWS command line, where it is installed. What else there is, the role of a machine or
of a pod, clients find by themselves.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import time
from configparser import ConfigParser, Error
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from elastrain.errors import StorageError

FILES = (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config"))
FRESH_S = 300.0  # after this the files are read again
PROCESS_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Keys:
    """An access key, and when to ask again, in seconds since 1970."""

    key_id: str
    secret: str
    token: str | None = None
    until: float


def find_keys() -> Keys | None:
    """Return the keys that environment or profile name, None where there are none or the machine's role has them.

    Raises StorageError if the profile that AWS_PROFILE names gives none.
    """
    until = time.time() + FRESH_S
    if key_id := os.environ.get("AWS_ACCESS_KEY_ID"):
        secret, token = (os.environ.get(name) for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"))
        return Keys(key_id=key_id, secret=secret or "", token=token or None, until=until)
    asked = os.environ.get("AWS_PROFILE")
    name = asked or "default"
    held = _profile(name)
    if "aws_access_key_id" in held and "aws_secret_access_key" in held:
        key_id, secret = held["aws_access_key_id"], held["aws_secret_access_key"]
        return Keys(key_id=key_id, secret=secret, token=held.get("aws_session_token"), until=until)
    if "credential_process" in held:
        return _of_process(shlex.split(held["credential_process"]), name)
    cli = shutil.which("aws") if asked and "role_arn" not in held else None  # a role: Arrow would not take it
    if cli:
        return _of_process([cli, "configure", "export-credentials", "--profile", name, "--format", "process"], name)
    if asked:
        what = "is a role to be assumed (role_arn)" if "role_arn" in held else "holds no keys and no credential_process"
        raise StorageError(
            f"AWS_PROFILE is {asked}, which {what}: put keys into the environment, with "
            f'eval "$(aws configure export-credentials --format env)" for instance'
        )
    return None


def _profile(name: str) -> dict[str, str]:
    """Return what the files say of a profile; the file of credentials goes before that of configuration."""
    held: dict[str, str] = {}
    for variable, file in FILES:
        known = ConfigParser(interpolation=None)
        path = Path(os.environ.get(variable) or Path.home() / ".aws" / file)
        with contextlib.suppress(OSError, UnicodeDecodeError, Error):
            known.read(path)
        for section in (name, f"profile {name}"):
            held = {**(dict(known[section]) if known.has_section(section) else {}), **held}
    return held


def _of_process(command: list[str], name: str) -> Keys:
    """Return what a command prints, in the form that the SDK's `credential_process` has."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_S, check=True)  # noqa: S603
        said = json.loads(done.stdout)
        expires = said.get("Expiration")
        until = datetime.fromisoformat(expires).timestamp() if expires else time.time() + FRESH_S
        return Keys(
            key_id=said["AccessKeyId"], secret=said["SecretAccessKey"], token=said.get("SessionToken"), until=until
        )
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError, AttributeError) as error:
        # What the command has printed may hold a key: it is not repeated.
        raise StorageError(
            f"the profile {name!r} gives no keys: {Path(command[0]).name} failed ({type(error).__name__}); run it by "
            f"hand, it may ask you to log in"
        ) from None


def for_obstore() -> dict[str, object]:
    """Return the keys in the form that obstore asks its provider for; raises StorageError if there are none."""
    keys = find_keys()
    if keys is None:
        raise StorageError("the keys for S3 are not there any more: restore the profile or the environment")
    return {
        "access_key_id": keys.key_id,
        "secret_access_key": keys.secret,
        "token": keys.token,
        "expires_at": datetime.fromtimestamp(keys.until, UTC),
    }
