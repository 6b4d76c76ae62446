"""Certificates for TLS: what they hold, and a real cluster that speaks with nobody who has none of its own."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from tests.cluster.head import Head, head
from tests.elastic.reference import ROOT, begin_reference

from elastrain.cluster.certificates import make_certificates, own_hosts
from elastrain.cluster.doors import knock, listeners, speaks_tls
from elastrain.cluster.environment import NO_EXPORTERS
from elastrain.elastic.session import ray_session
from elastrain.errors import ResourceError, SpecError, StorageError


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_an_authority_is_made_once_and_certificates_of_it_as_often_as_asked(tmp_path: Path) -> None:
    home, node = tmp_path / "tls", tmp_path / "node"
    first = make_certificates(str(home), ["head.example.internal", "10.1.2.3"])
    authority = (home / "ca.crt").read_bytes()
    second = make_certificates(str(home), out=str(node))
    assert (home / "ca.crt").read_bytes() == authority == (node / "ca.crt").read_bytes()
    assert sorted(path.name for path in node.iterdir()) == ["ca.crt", "node.crt", "node.key"], "the key stays at home"
    for folder in (home, node):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    mine, issuer = certificate(home / "node.crt"), certificate(home / "ca.crt")
    mine.verify_directly_issued_by(issuer)
    names = mine.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "head.example.internal" in names.get_values_for_type(x509.DNSName)
    assert ip_address("10.1.2.3") in names.get_values_for_type(x509.IPAddress)
    assert {"127.0.0.1", *own_hosts()} <= set(second["hosts"]) < set(first["hosts"])
    assert mine.serial_number != certificate(node / "node.crt").serial_number


def test_what_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"'a/b; c' is no address and no name"):
        make_certificates(str(tmp_path / "tls"), ["a/b; c"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot be written"):
        make_certificates(str(tmp_path / "file" / "tls"))
    make_certificates(str(tmp_path / "tls"))
    (tmp_path / "tls" / "ca.key").write_text("no key")
    with pytest.raises(StorageError, match=r"authority cannot be read .* restore ca.crt and ca.key"):
        make_certificates(str(tmp_path / "tls"))
    (tmp_path / "tls" / "ca.key").unlink()
    with pytest.raises(StorageError):
        make_certificates(str(tmp_path / "tls"))


# --- a cluster


@dataclass(frozen=True)
class Encrypted:
    """A head with TLS, the variables of who belongs to it, and a folder to write in."""

    head: Head
    environment: dict[str, str]
    folder: Path


@pytest.fixture(scope="module")
def encrypted() -> Iterator[Encrypted]:
    folder = Path(tempfile.mkdtemp(prefix="elastrain-"))
    try:
        environment = make_certificates(str(folder / "tls"))["environment"]
        with head(folder / "head", cpus=4, environment=NO_EXPORTERS | environment) as started:
            yield Encrypted(started, environment, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def elastrain(on: Encrypted, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command that belongs to the cluster."""
    command = [sys.executable, "-m", "elastrain", *arguments, "--address", on.head.address]
    return subprocess.run(
        command, env=os.environ | on.environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_cluster_with_tls_works_for_its_own_and_refuses_all_others(
    encrypted: Encrypted, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = elastrain(encrypted, "pack", "digits", str(encrypted.folder / "packed"))
    assert done.returncode == 0, done.stderr
    assert "train 1,442 rows" in done.stdout

    other = make_certificates(str(encrypted.folder / "other"))["environment"]
    swapped = {**encrypted.environment, "RAY_TLS_CA_CERT": other["RAY_TLS_CA_CERT"]}
    forged = {**other, "RAY_TLS_CA_CERT": encrypted.environment["RAY_TLS_CA_CERT"]}
    strangers: list[tuple[dict[str, str], str]] = [
        ({}, "it wants a certificate; set RAY_USE_TLS=1"),
        (swapped, "the certificates do not fit"),
        (forged, "the certificates do not fit"),
        ({"RAY_USE_TLS": "1"}, "RAY_USE_TLS is set, and 'RAY_TLS_CA_CERT' is not"),
    ]
    for environment, words in strangers:
        with monkeypatch.context() as patch:
            for name in encrypted.environment:
                patch.delenv(name, raising=False)
            for name, value in environment.items():
                patch.setenv(name, value)
            with pytest.raises(ResourceError, match=words), ray_session(encrypted.head.address, cpus=0):
                pytest.fail(f"let in with {environment}")


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_port_of_its_own_protocol_speaks_tls_and_doctor_says_so(encrypted: Encrypted) -> None:
    found = listeners([encrypted.head.address, str(encrypted.folder / "head" / "ray")])
    assert {each.port: knock(each.reachable, each.port) for each in found} == {each.port: "refused" for each in found}
    # What speaks HTTP stays as it is, on loopback or with a token.
    native = [each for each in found if each.process in ("gcs_server", "raylet")]
    assert len(native) >= 3
    assert all(speaks_tls(each.reachable, each.port) for each in native)
    done = elastrain(encrypted, "doctor", "--security")
    assert "ok    TLS                 Ray's gRPC is encrypted" in done.stdout, done.stderr


WAITS = """

class Waits(DigitsMLP):
    def losses(self, model, batch):
        import os, time
        from pathlib import Path

        here = Path(__file__).parent
        (here / f"worker-{os.getpid()}").touch()
        while not (here / "goes on").exists():
            time.sleep(0.05)
        return super().losses(model, batch)
"""


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_port_of_a_run_speaks_tls_and_it_comes_to_the_same_weights(encrypted: Encrypted, tmp_path: Path) -> None:
    """Of its membership and of its workers' doors: the first step waits until they were looked at."""
    digits, data = ROOT / "pipelines" / "digits_mlp", encrypted.folder / "packed"
    if not data.exists():
        assert elastrain(encrypted, "pack", "digits", str(data)).returncode == 0
    (tmp_path / "task.py").write_text((digits / "task.py").read_text() + WAITS)
    fixed = [f"data.train={data / 'train'}", f"data.eval={data / 'test'}", "data.slots=4", "budget={steps: 30}"]
    fixed += ["precision=fp32", "consistency=bitwise", "task_args={hidden: 16}"]
    reference = begin_reference(digits / "train.yaml", [*fixed, "workers.max=1"], cwd=tmp_path)
    spread = [f"task={tmp_path / 'task.py'}:Waits", f"storage={tmp_path}", "workers={min: 2, max: 2}"]
    sets = [word for each in fixed + spread for word in ("--set", each)]
    command = ["train", str(digits / "train.yaml"), *sets, "--json", "--address", encrypted.head.address]
    marks = [encrypted.head.address, str(encrypted.folder / "head" / "ray")]
    before, pipe = set(listeners(marks)), subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-m", "elastrain", *command],
        env=os.environ | encrypted.environment,
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as run:
        try:
            while len(workers := list(tmp_path.glob("worker-*"))) < 2:
                assert run.poll() is None, run.communicate()
                time.sleep(0.1)
            opened = set(listeners(marks)) - before
            plain = [each for each in opened if not speaks_tls(each.reachable, each.port)]
        finally:
            (tmp_path / "goes on").touch()
        out, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert plain == []
    ports = Counter(each.pid for each in opened)
    assert [ports[int(each.name.removeprefix("worker-"))] for each in workers] == [2, 2], "Ray's, and its door"
    assert sum(each.process.startswith("Host") for each in opened) == 2, "Ray's, and the membership"
    assert json.loads(out.splitlines()[-1])["weights_sha256"] == reference.weights_sha256()
