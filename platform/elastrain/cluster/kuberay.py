"""A spec as objects of Kubernetes: RayCluster and RayJob of the KubeRay operator, and a NetworkPolicy that closes them.

Pure: data in, data out. Pods run as a plain user without capabilities; a token is asked for on every port of Ray.
"""

import shlex
from collections.abc import Mapping
from typing import Any

from elastrain.cluster.environment import AUTHORITY_DIR, LABEL, MAKE_CERTIFICATE, NO_EXPORTERS, TLS_DIR, tls_variables
from elastrain.cluster.merging import merged
from elastrain.spec.cluster import Accelerator, ClusterSpec, Head, Mount, Pool
from elastrain.spec.providers import Job, KubeRay

RAY_VERSION = "2.60.0"
# Ray drains for so long when a pod is told to end, and Kubernetes kills it after the latter.
_DRAIN_S, _GRACE_S = 100, 120
_GPU = {"AMD": "amd.com/gpu", "Intel": "gpu.intel.com/xe"}
_TPU_NODES = {
    "TPU-V4": "tpu-v4-podslice",
    "TPU-V5P": "tpu-v5p-slice",
    "TPU-V5LITEPOD": "tpu-v5-lite-podslice",
    "TPU-V6E": "tpu-v6e-slice",
    "TPU-V7X": "tpu7x",
}
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "fsGroup": 100,
    "seccompProfile": {"type": "RuntimeDefault"},
}
_CERTIFICATE = {"name": "certificate", "mountPath": TLS_DIR}
_SECURITY = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def raycluster(spec: ClusterSpec) -> dict[str, Any]:
    """Return the RayCluster."""
    provider = _kuberay(spec)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": spec.name, "namespace": provider.namespace, "labels": {LABEL: spec.name}},
        "spec": cluster_body(spec),
    }


def cluster_body(spec: ClusterSpec) -> dict[str, Any]:
    """Return the `spec` of the RayCluster, which is also the `rayClusterSpec` of the RayJob."""
    provider = _kuberay(spec)
    auth = {"mode": "token"} | ({"secretName": provider.token_secret} if provider.token_secret else {})
    body: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "enableInTreeAutoscaling": True,
        "authOptions": auth,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 300,
            # After so long without capacity the next pool by priority is tried; Ray's default is an hour.
            "env": _variables(
                {**NO_EXPORTERS, **spec.env, "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": "900"}
            ),
            "resources": _same({"cpu": "500m", "memory": "1Gi"}),
            "securityContext": _SECURITY,
        },
        "headGroupSpec": _head_group(spec),
        "workerGroupSpecs": [_group(spec, pool) for pool in spec.pools],
    }
    if spec.tls:  # the autoscaler runs beside the head and speaks with it
        options = body["autoscalerOptions"]
        options["env"] += _variables(tls_variables(TLS_DIR))
        options["volumeMounts"] = [_CERTIFICATE]
    return dict(merged(body, spec.override))


def rayjob(spec: ClusterSpec) -> dict[str, Any]:
    """Return a RayJob: one run in a cluster of its own, which ends with it; the command of `provider.job` unless unset.

    Without `provider.job` the numbers are the type's.
    """
    provider = _kuberay(spec)
    job = provider.job or Job(command=("python", "-m", "elastrain"))
    submitter = {
        "name": "ray-job-submitter",
        "image": spec.image,
        "resources": _same({"cpu": "500m", "memory": "1Gi"}),
        "securityContext": _SECURITY,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": spec.name, "namespace": provider.namespace, "labels": {LABEL: spec.name}},
        "spec": {
            "entrypoint": shlex.join(job.command),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": job.keep_s,
            "backoffLimit": job.retries,
            "preRunningDeadlineSeconds": job.start_s,
            "submitterPodTemplate": {
                "metadata": {"labels": {LABEL: spec.name}},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "securityContext": _POD_SECURITY,
                    "containers": [submitter],
                },
            },
            "rayClusterSpec": cluster_body(spec),
        },
    }


def network_policy(spec: ClusterSpec) -> dict[str, Any]:
    """Return the NetworkPolicy: in, from each other and to the dashboard from the operator; out, names and HTTPS."""
    provider = _kuberay(spec)
    each_other = [{"podSelector": {"matchLabels": {LABEL: spec.name}}}]
    operator = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": provider.operator_namespace}}}]
    names = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": spec.name, "namespace": provider.namespace, "labels": {LABEL: spec.name}},
        "spec": {
            "podSelector": {"matchLabels": {LABEL: spec.name}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": each_other}, {"from": operator, "ports": [{"port": 8265, "protocol": "TCP"}]}],
            "egress": [
                {"to": each_other},
                {"to": names, "ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]},
                # Storage, and the API server, through which the autoscaler starts and ends pods.
                {"ports": [{"port": 443, "protocol": "TCP"}, {"port": 6443, "protocol": "TCP"}]},
            ],
        },
    }


def _kuberay(spec: ClusterSpec) -> KubeRay:
    assert isinstance(spec.provider, KubeRay)
    return spec.provider


def _variables(settings: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in settings.items()]


def _same(amounts: dict[str, str]) -> dict[str, Any]:
    """Return requests and limits that are equal, so that no pod is ended for what another one takes."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _head_group(spec: ClusterSpec) -> dict[str, Any]:
    head = spec.head
    group = {
        # In a pod the dashboard listens on the pod's address, for the operator; the NetworkPolicy closes it.
        "rayStartParams": {"num-cpus": "0", "num-gpus": "0", "dashboard-host": "0.0.0.0"},  # noqa: S104
        "labels": spec.offers(),
        "template": {
            "metadata": {"labels": {LABEL: spec.name}},
            "spec": _pod(spec, head, "ray-head", {}, head.identity),
        },
    }
    return dict(merged(group, head.override))


def _group(spec: ClusterSpec, pool: Pool) -> dict[str, Any]:
    start = {"num-cpus": str(pool.cpus)}
    accelerator = pool.accelerator
    extra: dict[str, str] = {}
    if accelerator:
        extra = {_device(accelerator): str(accelerator.count)}
        # From zero pods the autoscaler knows a kind only if told; it is written as text in text.
        start["resources"] = f'"{{\\"accelerator_type:{accelerator.type}\\": 1}}"'
        start |= {"num-gpus": str(accelerator.count)} if accelerator.resource == "GPU" else {}
    group: dict[str, Any] = {
        "groupName": pool.name,
        "replicas": pool.least,
        "minReplicas": pool.least,
        "maxReplicas": pool.most,
        "numOfHosts": _hosts(accelerator),
        "priority": pool.priority,
        "idleTimeoutSeconds": pool.idle_timeout_s,
        "labels": pool.node_labels(),
        "rayStartParams": start,
        "template": {
            "metadata": {"labels": {LABEL: spec.name, "elastrain/pool": pool.name}},
            "spec": _pod(spec, pool, "ray-worker", extra, pool.identity) | _nodes(spec, pool),
        },
    }
    return dict(merged(group, pool.override))


def _pod(
    spec: ClusterSpec, machine: Head | Pool, name: str, extra: dict[str, str], identity: str | None
) -> dict[str, Any]:
    amounts = {"cpu": str(machine.cpus), "memory": f"{machine.memory_gib}Gi", **extra}
    settings = {**NO_EXPORTERS, **spec.env, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(_DRAIN_S)}
    settings |= tls_variables(TLS_DIR) if spec.tls else {}
    shared = Mount(path="/dev/shm", scratch_gib=max(1, machine.memory_gib * 3 // 10))  # noqa: S108 -- Ray's object store
    container = {
        "name": name,
        "image": spec.image,
        "env": _variables(settings),
        "resources": _same(amounts),
        "securityContext": _SECURITY,
        "volumeMounts": [_mounted(at, mount) for at, mount in enumerate((shared, *machine.mounts))],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_S,
        "securityContext": _POD_SECURITY,
        "containers": [container],
        "volumes": [_volume(at, mount) for at, mount in enumerate((shared, *machine.mounts))],
    }
    if identity:
        pod["serviceAccountName"] = identity
    if spec.tls:
        _certify(spec, pod)
    return pod


def _certify(spec: ClusterSpec, pod: dict[str, Any]) -> None:
    """Have a container make the pod's certificate before Ray starts, valid for the head's service, too."""
    assert spec.tls is not None
    service = f"$(CLUSTER)-head-svc.{_kuberay(spec).namespace}.svc.cluster.local"
    cluster = {"name": "CLUSTER", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['ray.io/cluster']"}}}
    authority = {"name": "authority", "mountPath": AUTHORITY_DIR, "readOnly": True}
    maker = {
        "name": "certificate",
        "image": spec.image,
        "command": [*MAKE_CERTIFICATE.split(), "--host", service],
        "env": [cluster],
        "resources": _same({"cpu": "500m", "memory": "512Mi"}),
        "securityContext": _SECURITY,
        "volumeMounts": [authority, _CERTIFICATE],
    }
    pod["initContainers"] = [maker]
    pod["containers"][0]["volumeMounts"].append(_CERTIFICATE)
    pod["volumes"] += [
        {"name": "authority", "secret": {"secretName": spec.tls.secret_name, "defaultMode": 0o440}},
        {"name": "certificate", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
    ]


def _mounted(at: int, mount: Mount) -> dict[str, Any]:
    return {"name": f"mount-{at}", "mountPath": mount.path} | ({"readOnly": True} if mount.read_only else {})


def _volume(at: int, mount: Mount) -> dict[str, Any]:
    name = {"name": f"mount-{at}"}
    if mount.claim:
        return name | {"persistentVolumeClaim": {"claimName": mount.claim}}
    if mount.host:
        return name | {"hostPath": {"path": mount.host, "type": "Directory"}}
    memory = {"medium": "Memory"} if mount.path == "/dev/shm" else {}  # noqa: S108
    return name | {"emptyDir": {**memory, "sizeLimit": f"{mount.scratch_gib}Gi"}}


def _nodes(spec: ClusterSpec, pool: Pool) -> dict[str, Any]:
    """Return which nodes a pool's pods may be on: of its type and market, beside each other where asked."""
    spot = _kuberay(spec).spot_nodes
    accelerator = pool.accelerator
    selector: dict[str, str] = {"node.kubernetes.io/instance-type": pool.instance} if pool.instance else {}
    if accelerator and accelerator.topology:
        selector["cloud.google.com/gke-tpu-accelerator"] = _TPU_NODES[accelerator.type]
        selector["cloud.google.com/gke-tpu-topology"] = accelerator.topology
    tolerated = [_device(accelerator)] if accelerator else []
    affinity: dict[str, Any] = {}
    if pool.spot:
        selector |= spot
        tolerated += list(spot)
    elif spot:
        apart = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in spot.items()]
        required = {"nodeSelectorTerms": [{"matchExpressions": apart}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": required}
    if pool.placement:
        beside = {
            "labelSelector": {"matchLabels": {LABEL: spec.name, "elastrain/pool": pool.name}},
            "topologyKey": pool.placement,
        }
        affinity["podAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": [beside]}
    tolerations = [{"key": key, "operator": "Exists"} for key in tolerated]
    found = {"nodeSelector": selector, "tolerations": tolerations, "affinity": affinity}
    return {key: value for key, value in found.items() if value}


def _device(accelerator: Accelerator) -> str:
    """Return how Kubernetes calls an accelerator's device."""
    if accelerator.resource == "TPU":
        return "google.com/tpu"
    return next((device for maker, device in _GPU.items() if accelerator.type.startswith(maker)), "nvidia.com/gpu")


def _hosts(accelerator: Accelerator | None) -> int:
    """Return the pods of one replica: a TPU slice of several hosts comes and goes as a whole."""
    chips = 1
    for side in (accelerator.topology or "").split("x") if accelerator and accelerator.topology else []:
        chips *= int(side)
    return max(1, chips // accelerator.count) if accelerator else 1
