"""A run as objects of Kubernetes: a RayJob with a cluster of its own, and a ConfigMap with the code that it needs.

The same package that `submit` sends, mounted on every pod; the operator starts it, tries again and ends it. There is no
secret in them: the token is a Secret that the cluster's spec names, rights come from the pods' service accounts.
"""

import base64
import hashlib
import json
import re
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastrain import storage
from elastrain.cluster.check import check_cluster, check_manifest
from elastrain.cluster.document import ClusterDocument
from elastrain.cluster.environment import LABEL
from elastrain.cluster.folders import local_folders
from elastrain.cluster.forecast import forecast_cluster
from elastrain.cluster.kuberay import rayjob
from elastrain.cluster.merging import merged
from elastrain.cluster.package import ENVIRONMENT, RUN_KEY, archive, entrypoint, places, stage
from elastrain.cluster.render import as_yaml
from elastrain.errors import SpecError
from elastrain.spec.cluster import ClusterSpec, Head, Mount, Pool
from elastrain.spec.document import resolve
from elastrain.spec.providers import KubeRay
from elastrain.spec.train import TrainSpec

LIMIT = 1_000_000  # Kubernetes takes no ConfigMap of more than a MiB
FOLDER, FILE = "/etc/elastrain", "code.zip"
COMMAND = "elastrain submit --rayjob"
_VOLUME = "elastrain-code"


def run_manifests(spec: TrainSpec, document: ClusterDocument) -> dict[str, dict[str, Any]]:
    """Return what `kubectl create` is given for one run, by file name: `JOB-code.yaml` and `JOB-rayjob.yaml`.

    The RayJob is named after the run, so that Kubernetes takes only one at a time. What an attempt at it ends with ends
    the next ones; each call makes another job, with attempts of its own.

    Raises:
        SpecError: The cluster is not sound or not on Kubernetes, its pods do not see the run's folders, or the code is
            more than a ConfigMap holds.
        ResourceError: No pool can hold the run.
    """
    spec, cluster = resolve(spec, base=Path.cwd(), cwd=Path.cwd()), document.spec
    check_cluster(document)
    if not isinstance(cluster.provider, KubeRay):
        raise SpecError(
            f"a RayJob is for Kubernetes, and {cluster.name} is on {cluster.provider.type}: start that cluster, and "
            "send the run to it with --address"
        )
    forecast_cluster(cluster, spec)
    shared = _shared(spec, cluster)
    run = storage.absolute(storage.join(spec.storage, spec.name))
    name = rayjob_name(spec.name, run)
    code = _code(spec)
    # Also by what is in it: no RayJob ever finds the code of another one under this name.
    config = f"{name}-{hashlib.sha256(code).hexdigest()[:8]}"
    job = _with_code(rayjob(cluster), config)
    job["metadata"]["name"] = name
    job["spec"] |= {
        "entrypoint": entrypoint(shared, "--attempt-of", f"{name}-{uuid.uuid4().hex[:8]}"),
        "runtimeEnvYAML": json.dumps({"working_dir": f"file://{FOLDER}/{FILE}", "env_vars": ENVIRONMENT}),
        "metadata": {RUN_KEY: run},
    }
    check_manifest(document, job)
    return {f"{name}-code.yaml": _config_map(cluster, config, code), f"{name}-rayjob.yaml": job}


def as_text(files: Mapping[str, Mapping[str, Any]], document: ClusterDocument) -> str:
    """Return the files as one YAML stream for `kubectl create -f -`."""
    name = document.spec.name
    return "---\n".join(as_yaml(data, spec_name=name, command=COMMAND) for data in files.values()).rstrip()


def rayjob_name(name: str, run: str) -> str:
    """Return the name of a run's RayJob, of up to 47 small letters, digits and dashes.

    >>> rayjob_name("Digits_MLP.v2", "s3://bucket/Digits_MLP.v2"), rayjob_name("7b", "s3://bucket/7b")
    ('digits-mlp-v2-2478ad83', 'run-7b-400685a4')
    """
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:30].strip("-")
    slug = slug if slug[:1].isalpha() else f"run-{slug}".strip("-")
    return f"{slug}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"


def _shared(spec: TrainSpec, cluster: ClusterSpec) -> list[str]:
    """Return where all pods have mounted the claims that hold the run's folders; raises SpecError for any other."""
    found = []
    for place, folder in local_folders(places(spec)).items():
        mounts = [_mount_of(folder, machine) for machine in cluster.machines.values()]
        claims = {(mount.path, mount.claim) if mount and mount.claim else None for mount in mounts}
        if len(claims) > 1 or None in claims:
            raise SpecError(
                f"{place} is a folder, and not on one claim that head and all pools of {cluster.name} have mounted "
                f"there; give a URL such as s3://bucket/{spec.name}, or mount the same claim on each of them"
            )
        if place == spec.storage and any(mount and mount.read_only for mount in mounts):
            raise SpecError(f"{place}: the claim is mounted read_only, and runs are written there; mount it without")
        found += [mount.path for mount in mounts if mount]
    return list(dict.fromkeys(found))


def _mount_of(folder: Path, machine: Head | Pool) -> Mount | None:
    """Return the mount that a pod sees at `folder`: of those above it the nearest."""
    above = [mount for mount in machine.mounts if folder.is_relative_to(mount.path)]
    return max(above, key=lambda mount: len(Path(mount.path).parts), default=None)


def _code(spec: TrainSpec) -> bytes:
    with tempfile.TemporaryDirectory(prefix="elastrain-") as scratch:
        folder = Path(scratch).resolve()
        stage(spec, folder)
        return archive(folder, limit=LIMIT)


def _config_map(cluster: ClusterSpec, name: str, code: bytes) -> dict[str, Any]:
    assert isinstance(cluster.provider, KubeRay)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "namespace": cluster.provider.namespace, "labels": {LABEL: cluster.name}},
        "immutable": True,
        "binaryData": {FILE: base64.b64encode(code).decode()},
    }


def _with_code(job: dict[str, Any], config: str) -> dict[str, Any]:
    """Return a RayJob whose pods have mounted a ConfigMap at FOLDER."""
    body = job["spec"]["rayClusterSpec"]
    head, groups = body["headGroupSpec"], body["workerGroupSpecs"]
    mounted = {
        "headGroupSpec": merged(head, _mount("ray-head", config)),
        "workerGroupSpecs": [merged(group, _mount("ray-worker", config)) for group in groups],
    }
    return {**job, "spec": {**job["spec"], "rayClusterSpec": {**body, **mounted}}}


def _mount(container: str, config: str) -> dict[str, Any]:
    mount = {"name": _VOLUME, "mountPath": FOLDER, "readOnly": True}
    pod = {
        "containers": [{"name": container, "volumeMounts": [mount]}],
        "volumes": [{"name": _VOLUME, "configMap": {"name": config}}],
    }
    return {"template": {"spec": pod}}
