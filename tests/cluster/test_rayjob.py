"""A run as a RayJob: the package on every pod, nothing secret, one at a time, and refused before anything is made."""

import base64
import io
import json
import random
import shlex
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner, Result

from elastrain.__main__ import app
from elastrain.cluster.document import ClusterDocument, read_cluster
from elastrain.cluster.kuberay_rules import operator_findings
from elastrain.cluster.rayjob import FILE, FOLDER, as_text, rayjob_name, run_manifests
from elastrain.cluster.schemas import kuberay_findings
from elastrain.errors import DataError, ResourceError, SpecError
from elastrain.spec.document import read_train
from elastrain.spec.train import TrainSpec

CLUSTERS = Path(__file__).parents[2] / "clusters"
SPEC = """
name: rendered
task: code/task.py:Net
data: {train: s3://bucket/data/train, global_batch: 8}
optimizer: {name: adamw, lr: 0.1}
budget: {steps: 1}
storage: s3://bucket/runs
"""


def run(folder: Path, *sets: str) -> TrainSpec:
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "task.py").write_text("class Net: ...")
    (folder / "code" / ".env").write_text("SECRET=1")
    (folder / "spec.yaml").write_text(SPEC)
    return read_train(folder / "spec.yaml", sets)


def cluster(*sets: str, name: str = "kuberay") -> ClusterDocument:
    return read_cluster(CLUSTERS / f"{name}.yaml", sets)


def rendered(folder: Path, *sets: str, document: ClusterDocument | None = None) -> tuple[dict[str, Any], ...]:
    return tuple(run_manifests(run(folder, *sets), document or cluster()).values())


def test_every_pod_finds_the_package_of_the_run(tmp_path: Path) -> None:
    config, job = rendered(tmp_path)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(config["binaryData"][FILE]))) as packed:
        names = packed.namelist()
    assert {"run.yaml", "code0/task.py", "elastrain/training/loop.py"} <= set(names)
    assert not [name for name in names if "/." in name or "__pycache__" in name]
    assert config["immutable"]
    body = job["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (body["headGroupSpec"], *body["workerGroupSpecs"])]
    assert len(pods) > 2
    for pod in pods:
        assert {"name": "elastrain-code", "configMap": {"name": config["metadata"]["name"]}} in pod["volumes"]
        (mount,) = [each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "elastrain-code"]
        assert mount == {"name": "elastrain-code", "mountPath": FOLDER, "readOnly": True}
    assert json.loads(job["spec"]["runtimeEnvYAML"])["working_dir"] == f"file://{FOLDER}/{FILE}"
    assert job["metadata"]["namespace"] == config["metadata"]["namespace"] == "elastrain"


def test_the_operator_takes_it_ends_it_and_tries_again(tmp_path: Path) -> None:
    _, job = rendered(tmp_path, document=cluster("provider.job.retries=5", "provider.job.keep_s=60"))
    assert not [*kuberay_findings(job), *operator_findings(job)]
    spec = job["spec"]
    assert (spec["shutdownAfterJobFinishes"], spec["ttlSecondsAfterFinished"], spec["backoffLimit"]) == (True, 60, 5)
    assert "runtimeEnvYAMLs" not in spec
    assert list(kuberay_findings({**job, "spec": {**spec, "entryPoint": "x"}})), "an unknown key passes"
    _, without = rendered(tmp_path, document=cluster("provider.job=null"))
    assert without["spec"]["backoffLimit"] == 3


def test_only_environment_that_is_no_secret_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-7f3a91")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-7f3a91")
    document = cluster()
    files = run_manifests(run(tmp_path), document)
    assert "canary" not in as_text(files, document)
    _, job = files.values()
    assert json.loads(job["spec"]["runtimeEnvYAML"])["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "120"}


def test_one_run_has_one_name_and_each_rendering_is_a_job_of_its_own(tmp_path: Path) -> None:
    (one_code, one), (same_code, same) = rendered(tmp_path), rendered(tmp_path)
    assert one["metadata"]["name"] == same["metadata"]["name"] == rayjob_name("rendered", "s3://bucket/runs/rendered")
    assert one_code == same_code
    assert one["spec"]["entrypoint"] != same["spec"]["entrypoint"]
    (tmp_path / "code" / "helper.py").write_text("")
    other_code, other = rendered(tmp_path)
    assert other["metadata"]["name"] == one["metadata"]["name"]
    assert other_code["metadata"]["name"] != one_code["metadata"]["name"]
    elsewhere = rendered(tmp_path, "storage=s3://bucket/others")[1]
    assert elsewhere["metadata"]["name"] != one["metadata"]["name"]


def test_names_are_those_that_the_operator_takes(tmp_path: Path) -> None:
    _, job = rendered(tmp_path)
    for name in ("A" * 128, "7b", "a" * 29 + "-b", "._-", "x_y.z"):
        job["metadata"]["name"] = rayjob_name(name, f"runs/{name}")
        assert not list(operator_findings(job))


@pytest.mark.parametrize(
    ("sets", "document", "error", "text"),
    [
        (("storage=/mnt/runs",), cluster(), SpecError, "not on one claim that head and all pools of kuberay"),
        (("data.train=/mnt/data/x",), cluster(), SpecError, "/mnt/data/x is a folder"),
        ((), cluster(name="aws"), SpecError, "a RayJob is for Kubernetes, and aws is on aws"),
        (("workers={cpus: 500}",), cluster(), ResourceError, "can ever hold a worker of 500 CPUs"),
        (("workers={gpus: 1, accelerator: H200}",), cluster(), SpecError, "kuberay has T4, L4, A100, H100"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, sets: tuple[str, ...], document: ClusterDocument, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        rendered(tmp_path, *sets, document=document)


def mounted(claims: str, other: str | None = None) -> ClusterDocument:
    """The cluster with `claims` on the head and all pools, but `other` on the last pool."""
    pools = [f"pools.{at}.mounts={claims}" for at in range(len(cluster().spec.pools))]
    if other is not None:
        pools[-1] = f"pools.{len(pools) - 1}.mounts={other}"
    return cluster(f"head.mounts={claims}", *pools)


CLAIM = "[{path: /mnt/all, claim: all}]"
READ_ONLY = "[{path: /mnt/all, claim: all, read_only: true}]"


def test_a_folder_on_a_claim_that_all_have_is_fine(tmp_path: Path) -> None:
    _, job = rendered(tmp_path, "storage=/mnt/all/runs", document=mounted(CLAIM))
    assert " --shared /mnt/all --attempt-of " in job["spec"]["entrypoint"]
    assert rendered(tmp_path, "data.train=/mnt/all/data", document=mounted(READ_ONLY))


def test_a_pods_command_ends_with_what_the_run_ended_with_in_an_earlier_attempt_at_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, document = tmp_path / "all" / "data", mounted(f"[{{path: {tmp_path}/all, claim: all}}]")
    sets = (f"storage={tmp_path}/all/runs", f"data.train={data}")
    config, job = rendered(tmp_path, *sets, document=document)
    _, other = rendered(tmp_path, *sets, document=document)
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(config["binaryData"][FILE]))) as packed:
        packed.extractall(tmp_path / "pod")
    monkeypatch.chdir(tmp_path / "pod")

    def attempt(of: dict[str, Any]) -> str:
        python = ["exec", "python", "-m", "elastrain"]
        words = shlex.split(of["spec"]["entrypoint"])
        assert words[: len(python)] == python
        done = CliRunner().invoke(app, words[len(python) :])
        assert isinstance(done.exception, DataError), done.output
        return str(done.exception)

    first = attempt(job)
    assert str(data) in first
    data.mkdir(parents=True)  # with nothing in it, which is another error
    assert attempt(job) == first
    assert attempt(other) != first


@pytest.mark.parametrize(
    ("document", "text"),
    [
        (mounted(CLAIM, "[{path: /mnt/all, claim: others}]"), "not on one claim that head and all pools"),
        (mounted(CLAIM, "[{path: /mnt, claim: all}]"), "not on one claim that head and all pools"),
        (mounted(CLAIM, CLAIM[:-1] + ", {path: /mnt/all/runs, scratch_gib: 9}]"), "not on one claim that head"),
        (mounted(CLAIM, READ_ONLY), "mounted read_only, and runs are written there"),
    ],
)
def test_a_folder_that_only_seems_to_be_on_one_claim_is_refused(
    tmp_path: Path, document: ClusterDocument, text: str
) -> None:
    with pytest.raises(SpecError, match=text):
        rendered(tmp_path, "storage=/mnt/all/runs", document=document)


def test_more_code_than_a_config_map_holds_names_the_largest_files(tmp_path: Path) -> None:
    asked = run(tmp_path)
    for index in range(12):
        noise = random.Random(index).randbytes((index + 1) * 100_000)  # noqa: S311 -- what does not pack
        (tmp_path / "code" / f"weights{index:02d}.bin").write_bytes(noise)
    with pytest.raises(SpecError, match=r"packed, and at most 1\.0 MiB fit; put the task's file") as refused:
        run_manifests(asked, cluster())
    assert str(refused.value).count("weights") == 10
    assert "weights11.bin (1.1 MiB), code0/weights10.bin" in str(refused.value)


def submit(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["submit", *arguments])


def test_the_command_prints_both_for_kubectl(tmp_path: Path) -> None:
    run(tmp_path)
    spec = str(tmp_path / "spec.yaml")
    done = submit(spec, "--rayjob", str(CLUSTERS / "kuberay.yaml"))
    assert done.exit_code == 0, done.output
    assert [data["kind"] for data in YAML(typ="safe", pure=True).load_all(done.stdout)] == ["ConfigMap", "RayJob"]
    assert "of `elastrain submit" not in done.stdout
    refused = submit(spec, "--rayjob", str(CLUSTERS / "kuberay.yaml"), "--address", "http://127.0.0.1:8265")
    assert isinstance(refused.exception, SpecError)
    assert "sends nothing" in str(refused.exception)
