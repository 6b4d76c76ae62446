"""What is rendered is what lies beside the specs, what Ray and KubeRay take, and closed to strangers."""

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from elastrain.cluster.check import check_cluster
from elastrain.cluster.document import cluster_spec, read_cluster
from elastrain.cluster.environment import AUTHORITY_DIR, TLS_DIR, tls_variables
from elastrain.cluster.render import as_yaml, manifests, write
from elastrain.cluster.schemas import _kuberay_schemas, kuberay_findings
from elastrain.errors import StorageError
from elastrain.spec.cluster import ClusterSpec
from elastrain.spec.document import dump
from elastrain.spec.offers import offered
from elastrain.spec.problems import nowhere
from elastrain.spec.source import parse

CLUSTERS = Path(__file__).parents[2] / "clusters"
SPECS = ("aws", "azure", "gcp", "kuberay", "onprem")
MACHINES = ("aws", "azure", "gcp", "onprem")


def spec_of(name: str) -> ClusterSpec:
    return read_cluster(CLUSTERS / f"{name}.yaml").spec


def text_values(data: Any) -> Iterator[str]:
    if isinstance(data, dict):
        for value in data.values():
            yield from text_values(value)
    elif isinstance(data, list):
        for value in data:
            yield from text_values(value)
    else:
        yield str(data)


@pytest.mark.parametrize("name", SPECS)
def test_rendered_files_are_those_that_lie_there(name: str) -> None:
    for file, data in manifests(spec_of(name)).items():
        there = (CLUSTERS / "rendered" / file).read_text(encoding="utf-8")
        assert as_yaml(data, spec_name=name) == there, f"render clusters/{name}.yaml again"
        assert YAML(typ="safe", pure=True).load(there) == data, "YAML 1.2 reads something else than was meant"


@pytest.mark.parametrize("name", SPECS)
def test_ray_and_kubernetes_read_what_was_meant(name: str) -> None:
    """They read YAML 1.1, where a bare `yes` is true and `1:30` a number."""
    import yaml  # type: ignore[import-untyped] # Ray brings it along

    words = ("yes", "off", "~", "1e3", "0x1F", "012", "1:30", "2026-11-27", "", "=", ".5", "-1", "null", "a: b", "*x")
    spec = spec_of(name).model_copy(update={"env": {f"V{at}": word for at, word in enumerate(words)}})
    for data in manifests(spec).values():
        text = as_yaml(data, spec_name=name)
        assert yaml.safe_load(text) == data
        assert "&id" not in text


def test_no_other_file_lies_there() -> None:
    made = {file for name in SPECS for file in manifests(spec_of(name))}
    assert {path.name for path in (CLUSTERS / "rendered").iterdir()} == made
    assert {path.stem for path in CLUSTERS.glob("*.yaml")} >= set(SPECS)


@pytest.mark.parametrize("name", [*SPECS, "local-autoscaling/cluster"])
def test_a_spec_round_trips_through_yaml(name: str) -> None:
    spec = spec_of(name)
    assert cluster_spec(parse(dump(spec), name="dumped").data, nowhere) == spec


@pytest.mark.parametrize("name", MACHINES)
def test_ray_takes_what_is_rendered(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    (data,) = manifests(spec_of(name)).values()
    prepared = prepare_config(copy.deepcopy(data))
    validate_config(prepared)
    # Nothing of Ray's own commands, which install a nightly Ray and open the dashboard to all.
    assert "pip install" not in str(prepared)
    assert prepared["docker"]["image"] == "registry.example.com/elastrain:0.1.0"


@pytest.mark.parametrize("name", ["aws", "azure", "gcp"])
def test_rays_autoscaler_reads_the_pools_as_they_were_meant(name: str) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    spec = spec_of(name)
    (data,) = manifests(spec).values()
    kinds = AutoscalingConfig({**copy.deepcopy(data), "auth": {}}, skip_content_hash=True).get_node_type_configs()
    assert kinds["head"].resources == {"CPU": 0}
    assert offered(kinds["head"].labels) == [pool.resources() for pool in spec.pools]
    for pool in spec.pools:
        kind = kinds[pool.name]
        assert (kind.min_worker_nodes, kind.max_worker_nodes) == (pool.least, pool.most)
        assert (kind.priority, kind.idle_timeout_s) == (pool.priority, pool.idle_timeout_s)
        assert kind.resources == pool.resources()
        assert kind.labels == pool.node_labels()


def test_rays_autoscaler_reads_the_groups_as_they_were_meant() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = spec_of("kuberay")
    kinds = _derive_autoscaling_config_from_ray_cr(manifests(spec)["kuberay-raycluster.yaml"])["available_node_types"]
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    assert kinds["headgroup"]["max_workers"] == 0
    assert offered(kinds["headgroup"]["labels"]) == [pool.resources() for pool in spec.pools]
    for pool in spec.pools:
        kind = kinds[pool.name]
        asked = pool.resources()
        assert {name: kind["resources"][name] for name in asked} == asked
        assert kind["labels"] == pool.node_labels()
        assert kind["priority"] == pool.priority
        assert kind["idle_timeout_s"] == pool.idle_timeout_s


def test_kuberay_takes_what_is_rendered() -> None:
    for file in ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml"):
        data = manifests(spec_of("kuberay"))[file]
        assert not list(kuberay_findings(data))
        wrong = copy.deepcopy(data)
        wrong["spec"]["rayversion"] = "2"
        assert list(kuberay_findings(wrong)), "an unknown key passes"


def test_the_network_policy_is_one() -> None:
    """KubeRay's definitions hold Kubernetes' own of ingress and egress rules."""
    data = manifests(spec_of("kuberay"))["kuberay-networkpolicy.yaml"]["spec"]
    rules = _kuberay_schemas()["$defs"]["RayClusterSpec"]["properties"]["networkPolicy"]["properties"]["head"]
    jsonschema.validate(data["ingress"], rules["properties"]["ingressRules"])
    jsonschema.validate(data["egress"], rules["properties"]["egressRules"])
    assert data["policyTypes"] == ["Ingress", "Egress"]
    assert all("from" in rule for rule in data["ingress"]), "everybody is let in"
    # It holds all pods of the cluster: the label is on each of them.
    (label,) = data["podSelector"]["matchLabels"].items()
    job = manifests(spec_of("kuberay"))["kuberay-rayjob.yaml"]["spec"]
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    templates = [job["submitterPodTemplate"], *(group["template"] for group in groups)]
    assert all(label in template["metadata"]["labels"].items() for template in templates)


@pytest.mark.parametrize("name", MACHINES)
def test_machines_are_closed(name: str) -> None:
    (data,) = manifests(spec_of(name)).values()
    texts = "\n".join(text_values(data))
    assert "0.0.0.0" not in texts  # noqa: S104
    assert "--dashboard-host=127.0.0.1" in data["head_start_ray_commands"][-1]
    assert "--env RAY_AUTH_MODE=token" in data["docker"]["run_options"]
    if name != "onprem":
        assert data["provider"]["use_internal_ips"]
        assert not data["provider"]["cache_stopped_nodes"]
    if name == "aws":
        nodes = [each["node_config"] for each in data["available_node_types"].values()]
        assert all(node["SecurityGroupIds"] and node["IamInstanceProfile"] for node in nodes)
        heads = {node["IamInstanceProfile"]["Arn"] for node in nodes[:1]}
        assert not heads & {node["IamInstanceProfile"]["Arn"] for node in nodes[1:]}, "workers may do what the head may"


@pytest.mark.parametrize(("name", "pool"), [("aws", "h100-spot"), ("gcp", "tpu-v6e"), ("azure", "h100-spot")])
def test_nodes_of_spot_pools_and_no_others_watch_for_the_clouds_notice(name: str, pool: str, tmp_path: Path) -> None:
    """Ray runs each command by a shell of its own, with the name of the node's type in the environment."""
    spec = spec_of(name)
    (data,) = manifests(spec).values()
    recorder = tmp_path / "python"
    recorder.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    recorder.chmod(0o755)
    watched = {each.name for each in spec.pools if each.spot}
    assert pool in watched
    for each in spec.pools:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RAY_NODE_TYPE_NAME": each.name, "RAY_HEAD_IP": "10.0.0.1"}
        command = data["worker_start_ray_commands"][-1].replace("/tmp/elastrain", f"{tmp_path}/elastrain")  # noqa: S108
        done = subprocess.run(["/bin/bash", "-c", f"{command}; wait"], env=environment, check=False, timeout=60)
        assert done.returncode == 0
        asked = tmp_path / "asked"
        assert asked.exists() == (each.name in watched), each.name
        if asked.exists():
            assert asked.read_text().split() == [
                *("-m", "elastrain.cluster.preemption", name, "--address", "10.0.0.1:6379")
            ]
            asked.unlink()


@pytest.mark.parametrize("name", ["onprem", "kuberay"])
def test_where_no_watcher_is_needed_there_is_none(name: str) -> None:
    """Hosts of one's own are not taken away, and in a pod Ray itself drains on SIGTERM, with time to do so."""
    texts = "\n".join(text for data in manifests(spec_of(name)).values() for text in text_values(data))
    assert "preemption" not in texts
    for group in manifests(spec_of("kuberay"))["kuberay-raycluster.yaml"]["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (given,) = [each for each in pod["containers"][0]["env"] if each["name"].endswith("DRAIN_TIMEOUT_S")]
        assert int(given["value"]) < pod["terminationGracePeriodSeconds"]


def test_pods_are_closed() -> None:
    body = manifests(spec_of("kuberay"))["kuberay-raycluster.yaml"]["spec"]
    assert body["authOptions"] == {"mode": "token", "secretName": "elastrain-token"}
    for group in (body["headGroupSpec"], *body["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["containers"][0]["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }


@pytest.mark.parametrize("name", MACHINES)
def test_machines_with_tls_make_their_own_certificates_before_ray_starts(name: str) -> None:
    spec = read_cluster(CLUSTERS / f"{name}.yaml", ["tls={folder: ~/.elastrain/tls}"]).spec
    (data,) = manifests(spec).values()
    options = data["docker"]["run_options"]
    assert {f"--env {key}={value}" for key, value in tls_variables(TLS_DIR).items()} <= set(options)
    assert data["file_mounts"][AUTHORITY_DIR] == "~/.elastrain/tls"
    for kind in ("head", "worker"):
        _, certify, start = data[f"{kind}_start_ray_commands"][:3]
        assert certify.startswith(f"python -m elastrain cluster certificates {AUTHORITY_DIR} --out {TLS_DIR}")
        assert " ray start " in start
        assert ("--host h100-2.example.internal" in certify) is (name == "onprem")
    assert check_cluster(read_cluster(CLUSTERS / f"{name}.yaml", ["tls={folder: ~/.elastrain/tls}"]))


def test_pods_with_tls_make_their_own_certificates_before_ray_starts() -> None:
    document = read_cluster(CLUSTERS / "kuberay.yaml", ["tls={secret_name: elastrain-tls}"])
    files = manifests(document.spec)
    assert check_cluster(document)
    body = files["kuberay-raycluster.yaml"]["spec"]
    assert files["kuberay-rayjob.yaml"]["spec"]["rayClusterSpec"] == body
    variables = {(name, value) for name, value in tls_variables(TLS_DIR).items()}
    for group in (body["headGroupSpec"], *body["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (maker,), (ray,) = pod["initContainers"], pod["containers"]
        assert maker["command"][:5] == ["python", "-m", "elastrain", "cluster", "certificates"]
        assert maker["command"][-1] == "$(CLUSTER)-head-svc.elastrain.svc.cluster.local"
        assert variables <= {(each["name"], each["value"]) for each in ray["env"]}
        assert "authority" not in {each["name"] for each in ray["volumeMounts"]}, "Ray never sees the authority's key"
        assert {"name": "certificate", "mountPath": TLS_DIR} in ray["volumeMounts"]
        assert maker["securityContext"] == ray["securityContext"]
    options = body["autoscalerOptions"]
    assert variables <= {(each["name"], each["value"]) for each in options["env"]}
    assert options["volumeMounts"] == [{"name": "certificate", "mountPath": TLS_DIR}]


def test_spot_pods_and_others_are_on_their_own_nodes() -> None:
    body = manifests(spec_of("kuberay"))["kuberay-raycluster.yaml"]["spec"]
    pods = {group["groupName"]: group["template"]["spec"] for group in body["workerGroupSpecs"]}
    assert pods["h100-spot"]["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    away = pods["h100"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert away["nodeSelectorTerms"][0]["matchExpressions"][0]["operator"] == "NotIn"
    assert "podAffinity" in pods["h100"]["affinity"]


def test_a_slice_of_several_hosts_is_one_replica() -> None:
    body = manifests(spec_of("kuberay"))["kuberay-raycluster.yaml"]["spec"]
    hosts = {group["groupName"]: group["numOfHosts"] for group in body["workerGroupSpecs"]}
    assert hosts["tpu-v6e"] == 2  # 2x4 chips, 4 a host
    assert hosts["h100"] == 1


@pytest.mark.parametrize("name", SPECS)
def test_no_token_or_key_is_rendered(name: str) -> None:
    texts = "\n".join(text for data in manifests(spec_of(name)).values() for text in text_values(data))
    assert not re.search(r"AKIA|BEGIN|RAY_AUTH_TOKEN=|SECRET", texts)


def test_files_that_cannot_be_written_are_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write(spec_of("onprem"), str(tmp_path / "file"))
