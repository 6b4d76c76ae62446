"""Keys in Vault. No server of it can be had here: a small one on loopback speaks the part of its API that is used.

It checks tokens and namespaces, and encrypts with AES-GCM as the transit engine does.
"""

import base64
import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from elastrain import vault
from elastrain.encryption import Encryptor, decrypt
from elastrain.errors import StorageError
from elastrain.keys import check_key, key_service

TOKEN = "hvs.hidden"  # noqa: S105 -- of a test


class Engine(BaseHTTPRequestHandler):
    """`POST /v1/transit/encrypt/NAME` and `decrypt`; the first `failing` requests are answered with 503."""

    keys: dict[str, AESGCM]
    failing = 0

    def do_POST(self) -> None:
        """Answer a request."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        code = self._refusal()
        verb, name = self.path.split("/")[-2:]
        found: dict[str, object] = {"errors": [f"cannot {verb} {body}"]}
        if not code:
            try:
                code, found = 200, {"data": getattr(self, f"_{verb}")(name, body)}
            except (InvalidTag, KeyError, ValueError):
                code = 400
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refusal(self) -> int:
        kind = type(self)
        if kind.failing:
            kind.failing -= 1
            return 503
        if self.headers["X-Vault-Token"] != TOKEN or self.headers["X-Vault-Request"] != "true":
            return 403
        is_there = self.path.startswith("/v1/transit/") and self.headers["X-Vault-Namespace"] != "elsewhere"
        return 0 if is_there else 404

    def _encrypt(self, name: str, body: dict[str, str]) -> dict[str, str]:
        key, nonce = self.keys.setdefault(name, AESGCM(AESGCM.generate_key(256))), os.urandom(12)
        sealed = nonce + key.encrypt(nonce, body["plaintext"].encode(), None)
        return {"ciphertext": f"vault:v1:{base64.b64encode(sealed).decode()}"}

    def _decrypt(self, name: str, body: dict[str, str]) -> dict[str, str]:
        sealed = base64.b64decode(body["ciphertext"].removeprefix("vault:v1:"), validate=True)
        return {"plaintext": self.keys[name].decrypt(sealed[:12], sealed[12:], None).decode()}

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Engine]]:
    """A server, to which the environment leads."""
    handler = type("Fresh", (Engine,), {"keys": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("ELASTRAIN_KMS", "elastrain.vault:Transit")
        monkeypatch.setenv("VAULT_ADDR", f"http://127.0.0.1:{found.server_port}")
        monkeypatch.setenv("VAULT_TOKEN", TOKEN)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("VAULT_NAMESPACE", raising=False)
        monkeypatch.setattr(time, "sleep", lambda _: None)
        yield handler
        found.shutdown()


@pytest.mark.usefixtures("server")
def test_data_keys_are_wrapped_and_files_are_encrypted_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_key("main")
    wrapped = key_service().wrap(b"k" * 32, "main")
    assert wrapped.startswith("vault:v1:")
    assert key_service().unwrap(wrapped, "main") == b"k" * 32
    data = Encryptor("main").encrypt(b"weights", context="checkpoint 1 x")
    assert b"vault:v1:" in data
    assert decrypt(data, context="checkpoint 1 x", where="x") == b"weights"
    monkeypatch.delenv("VAULT_TOKEN")
    (tmp_path / ".vault-token").write_text(f"{TOKEN}\n")
    assert key_service().unwrap(wrapped, "main") == b"k" * 32


def test_what_may_pass_is_tried_again(server: type[Engine]) -> None:
    server.failing = vault.ATTEMPTS - 1
    check_key("main")
    server.failing = 2 * vault.ATTEMPTS
    with pytest.raises(StorageError, match=r"^the key 'main' at http://127\S+: Vault is sealed or down: unseal it$"):
        check_key("main")


WRONG = {
    "token": ({"VAULT_TOKEN": "hidden"}, r"permission denied: .* may not update transit/decrypt/main"),
    "namespace": ({"VAULT_NAMESPACE": "elsewhere"}, "there is no transit engine at transit/"),
    "no token": ({"VAULT_TOKEN": ""}, "set VAULT_TOKEN, or log in with `vault login`"),
    "no address": ({"VAULT_ADDR": ""}, "set VAULT_ADDR to the server, as https"),
    "a secret in it": ({"VAULT_ADDR": "https://me:hidden@host"}, "without credentials"),
    "in the clear": ({"VAULT_ADDR": "http://vault.example"}, "unencrypted; data keys need https"),
    "nobody there": ({"VAULT_ADDR": "http://127.0.0.1:9"}, "no proper answer from http://127.0.0.1:9"),
}


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence_without_a_secret(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = key_service().wrap(b"k" * 32, "main")
    changes, words = WRONG[case]
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match=words) as caught:
        key_service().unwrap(wrapped, "main")
    said = str(caught.value)
    assert caught.value.exit_code == 5
    assert said.startswith("the key 'main'")
    for secret in ("\n", "hidden", base64.b64encode(b"k" * 32).decode()):
        assert secret not in said


@pytest.mark.usefixtures("server")
def test_another_key_or_an_altered_text_does_not_open() -> None:
    wrapped = key_service().wrap(b"k" * 32, "main")
    key_service().wrap(b"k" * 32, "other")
    for text, name in ((wrapped, "other"), (wrapped[:-8] + "AAAAAAA=", "main"), (wrapped, "nobody"), ("x", "main")):
        with pytest.raises(
            StorageError, match="Vault does not decrypt with it: there is no such key, or it is"
        ) as caught:
            key_service().unwrap(text, name)
        assert wrapped not in str(caught.value)
