"""Encrypted checkpoints: the same state and the same weights, nothing of it readable, and no byte changed unseen."""

import base64
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.training.harness import Classifier, Setup, make_spec, small_state, train_alone
from tests.training.test_snapshot import Shelf, taken

from elastrain.errors import ConflictError, SpecError, StorageError
from elastrain.spec.train import CheckpointSpec
from elastrain.training import snapshot
from elastrain.training.checkpoint import Writer, as_bytes, contents, load
from elastrain.training.export import export_weights
from elastrain.training.manifests import adopt, described, folder, newest_whole, read_manifest, write_manifest
from elastrain.training.snapshot import Snapshots
from elastrain.training.state import digest

KEY = base64.b64encode(bytes(range(32))).decode()
ENCRYPTED = CheckpointSpec(encrypt="main", keep=10)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ELASTRAIN_KMS", raising=False)
    monkeypatch.delenv("ELASTRAIN_KEYS", raising=False)
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", KEY)


def commit(run: Path, step: int, spec: CheckpointSpec = ENCRYPTED, size: int = 8) -> str:
    """Commit a small state; return the checkpoint's folder."""
    writer = Writer(str(run), spec)
    writer.commit(small_state(size)[0], {"step": step, "note": "canary!"}, {})
    writer.wait()
    return folder(str(run), step)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def files_of(url: str) -> dict[str, bytes]:
    return {path.name.rpartition("-")[2]: path.read_bytes() for path in Path(url).iterdir()}


def path_of(url: str, name: str) -> Path:
    (path,) = Path(url).glob(f"*-{name}")
    return path


def test_an_encrypted_checkpoint_holds_what_a_plain_one_holds_and_shows_nothing(tmp_path: Path) -> None:
    plain, held = commit(tmp_path / "a", 1, CheckpointSpec(), 500_000), commit(tmp_path / "b", 1, size=500_000)
    one, other = load(str(tmp_path / "a"), 1), load(str(tmp_path / "b"), 1)
    assert equal(dict(one.tensors), dict(other.tensors))
    assert one.numbers == other.numbers
    assert files_of(plain).keys() == files_of(held).keys()
    weights = small_state(500_000)[0]["model/weight"].numpy().tobytes()
    secrets = [b"canary!", b"weight", weights[:64], weights[-64:], bytes(range(32)), KEY.encode()]
    everything = b"".join(data for name, data in sorted(files_of(held).items()))
    assert [secret for secret in secrets if secret in everything] == []
    shown = b"".join(files_of(plain).values())
    assert [secret for secret in secrets if secret in shown] == secrets[:4], "the test can see what is not encrypted"
    assert len(files_of(held)["model.safetensors"]) > 1 << 20, "several pieces"
    manifest = read_manifest(str(tmp_path / "b"), 1)
    assert manifest["files"] == {n: described(d) for n, d in files_of(held).items() if n != "manifest.json"}
    assert len({data for name, data in files_of(commit(tmp_path / "c", 1)).items()} & set(files_of(held).values())) == 0


def test_of_fifty_flipped_bits_none_passes_and_none_even_where_the_manifest_says_so(tmp_path: Path) -> None:
    url = commit(tmp_path, 1)
    manifest, good = read_manifest(str(tmp_path), 1), files_of(url)
    places = [(name, bit) for name in manifest["files"] for bit in range(len(good[name]) * 8)]
    for name, bit in random.Random(3).sample(places, 50):  # noqa: S311 -- a seeded choice, no secret
        flipped = bytearray(good[name])
        flipped[bit // 8] ^= 1 << bit % 8
        path_of(url, name).write_bytes(flipped)
        with pytest.raises(StorageError, match=rf"{name}: corrupted \(not the bytes that the checkpoint's manifest"):
            load(str(tmp_path), 1)
        # whoever may write can write the manifest, too, but has no key
        files = {**manifest["files"], name: described(bytes(flipped))}
        write_manifest(str(tmp_path), 1, files, manifest["info"], part=manifest["part"])
        with pytest.raises(StorageError, match=name):
            load(str(tmp_path), 1)
        path_of(url, name).write_bytes(good[name])
        Path(url, "manifest.json").write_bytes(good["manifest.json"])
    assert load(str(tmp_path), 1).numbers["step"] == 1


def test_a_file_of_another_step_run_or_name_does_not_open(tmp_path: Path) -> None:
    url = commit(tmp_path / "a", 1)
    manifest, good = read_manifest(str(tmp_path / "a"), 1), files_of(url)
    target, second = path_of(url, "model.safetensors"), commit(tmp_path / "a", 2)
    for other in (path_of(second, "model.safetensors"), path_of(url, "optimizer.safetensors")):
        data = other.read_bytes()
        target.write_bytes(data)
        files = {**manifest["files"], "model.safetensors": described(data)}
        write_manifest(str(tmp_path / "a"), 1, files, {}, part=manifest["part"])
        with pytest.raises(StorageError, match=r"model.safetensors: corrupted \(not the bytes that were encrypted"):
            load(str(tmp_path / "a"), 1)
    target.write_bytes(good["model.safetensors"])
    Path(url, "manifest.json").write_bytes(good["manifest.json"])
    load(str(tmp_path / "a"), 1)


def test_without_the_key_or_with_another_one_a_checkpoint_is_whole_but_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = commit(tmp_path, 1)
    for key, told in (
        (base64.b64encode(bytes(32)).decode(), "does not open what was encrypted"),
        ("", "no key 'main'"),
    ):
        monkeypatch.setenv("ELASTRAIN_KEY_MAIN", key)
        assert newest_whole(str(tmp_path), warn=pytest.fail) == 1, "a run must not begin again for lack of a key"
        with pytest.raises(StorageError, match=rf"{url}/.* is encrypted: .*{told}"):
            load(str(tmp_path), 1)
        with pytest.raises(StorageError, match=told):
            export_weights(str(tmp_path), str(tmp_path / "out"), step=1, weights="model")
    with pytest.raises(StorageError, match="no key 'main'"):
        commit(tmp_path, 2)
    assert newest_whole(str(tmp_path), warn=pytest.fail) == 1
    monkeypatch.setenv("ELASTRAIN_KEY_MAIN", KEY)
    commit(tmp_path, 2, CheckpointSpec(keep=10))
    assert [load(str(tmp_path), step).numbers["step"] for step in (1, 2)] == [1, 2], "each file tells by itself"


def test_training_comes_to_the_same_bits_and_exports_them_unencrypted(tmp_path: Path) -> None:
    found = []
    for number, key in enumerate((None, "main")):
        setup = Setup(
            spec=make_spec(**{"checkpoint.encrypt": key}), kind=Classifier, run_url=str(tmp_path / str(number))
        )
        found.append(train_alone(setup)[1]["weights_sha256"])
    assert found[0] == found[1]
    out = str(tmp_path / "model.safetensors")
    assert export_weights(str(tmp_path / "1"), out, step=None, weights="model")["weights_sha256"] == found[0]
    assert digest(load_file(out)) == found[0]


def test_a_snapshot_leaves_the_worker_encrypted_and_becomes_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "SNAPSHOT_S", 0.0)
    shelf, (tensors, _) = Shelf(), small_state()
    taken(Snapshots(shelf, settle=lambda: None, encrypt="main"), tensors, 7)
    manifest, files = shelf.held[7]
    plain = {name: as_bytes(content) for name, content in contents(tensors, json.dumps({"step": 7}))}
    assert files.keys() == plain.keys()
    assert all(data.startswith(b"elastrain-encrypted 1\n") for data in files.values())
    adopt(str(tmp_path), 7, manifest, lambda name: [files[name]])
    assert equal(dict(load(str(tmp_path), 7).tensors), tensors)
    monkeypatch.delenv("ELASTRAIN_KEY_MAIN")
    snapshots = Snapshots(shelf, settle=lambda: None, encrypt="main")
    taken(snapshots, tensors, 8)
    assert 8 not in shelf.held
    assert [kind for kind, _ in snapshots.events] == ["snapshot_lost"]


def test_what_is_written_to_the_disk_on_the_way_is_encrypted_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bytes] = []

    def look() -> None:
        seen.extend(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        raise ConflictError("stop here")

    monkeypatch.setattr("elastrain.training.checkpoint.save_file", lambda *_: pytest.fail("unencrypted on the disk"))
    writer = Writer(str(tmp_path), ENCRYPTED, settle=look)
    writer.commit(small_state()[0], {"step": 1}, {})
    with pytest.raises(ConflictError):
        writer.wait()
    assert len(seen) == 4
    assert all(data.startswith(b"elastrain-encrypted 1\n") for data in seen)


def test_a_name_that_is_none_is_refused_and_not_repeated() -> None:
    from elastrain.spec.document import read_train

    spec = Path(__file__).parents[2] / "pipelines" / "digits_mlp" / "train.yaml"
    with pytest.raises(SpecError) as caught:
        read_train(str(spec), [f"checkpoint.encrypt={KEY}"])
    assert "the name of a key is up to 63 small letters" in str(caught.value)
    told = str(caught.value).replace(f"--set checkpoint.encrypt={KEY}", "")
    assert KEY not in told
