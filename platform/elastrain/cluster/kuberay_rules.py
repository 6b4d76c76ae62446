"""What the KubeRay operator (1.7.0) refuses although its schema lets it pass, and what would open or weaken a cluster.

In: a RayCluster or RayJob as plain data that fit the schema. Out: where something is wrong, and a sentence. Only what a
spec and its overrides can bring about is here.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from elastrain.cluster.environment import LABEL
from elastrain.cluster.schemas import Finding
from elastrain.spec.cluster import LABEL_NAME
from elastrain.spec.problems import Keys, nearest

_MAX_NAME = {"RayCluster": 53, "RayJob": 47}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_GATED = {
    "networkPolicy": "the operator's gate RayClusterNetworkPolicy is shut by default; ours is a file of its own",
    "tlsOptions": "the operator's gate RayClusterMTLS is shut by default",
    "historyServerOptions": "the operator's gate RayClusterHistoryServer is shut by default",
}
_V2 = "RAY_enable_autoscaler_v2"
_STARTED = ("num-cpus", "num-gpus", "memory", "resources")


def operator_findings(manifest: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a RayCluster or RayJob that fits the operator's schema."""
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    if len(name) > _MAX_NAME[kind] or not _DNS_1035.fullmatch(name):
        yield ("metadata", "name"), f"a {kind} has a name of up to {_MAX_NAME[kind]} small letters, digits and dashes"
    here: Keys = ("spec",) if kind == "RayCluster" else ("spec", "rayClusterSpec")
    body = manifest["spec"] if kind == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    for path, text in (*_cluster(body), *_auth(body), *_groups(body), *_held(body, manifest["metadata"]["labels"])):
        yield (*here, *path), text


def policy_findings(policy: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a NetworkPolicy (networking.k8s.io/v1): unknown keys, and whom it lets in by mistake."""
    if (policy.get("apiVersion"), policy.get("kind")) != ("networking.k8s.io/v1", "NetworkPolicy"):
        yield ("apiVersion",), "a NetworkPolicy is of networking.k8s.io/v1"
    body, here = policy["spec"], ("spec",)
    yield from _known(body, here, ("podSelector", "policyTypes", "ingress", "egress"))
    name = {LABEL: policy["metadata"]["labels"][LABEL]}
    if body.get("podSelector") != {"matchLabels": name}:
        yield (*here, "podSelector"), f"the NetworkPolicy must hold the pods with {_words(name)}, and no others"
    if sorted(body.get("policyTypes", [])) != ["Egress", "Ingress"]:
        yield (*here, "policyTypes"), "policyTypes are Ingress and Egress: a way that is not named is open"
    for way, peers in (("ingress", "from"), ("egress", "to")):
        for at, rule in enumerate(body.get(way, [])):
            yield from _rule((*here, way, at), rule, peers)
    if not any({"podSelector": {"matchLabels": name}} in rule.get("from", []) for rule in body.get("ingress", [])):
        yield (*here, "ingress"), "pods of the cluster must reach each other"


def _rule(here: Keys, rule: Mapping[str, Any], peers: str) -> Iterator[Finding]:
    yield from _known(rule, here, (peers, "ports"))
    if peers == "from" and not rule.get("from"):
        yield (*here, "from"), "an ingress rule without `from` lets everybody in"
    if not rule.get(peers) and not rule.get("ports"):
        yield here, "a rule without peers and ports allows everything"
    for at, peer in enumerate(rule.get(peers, [])):
        yield from _known(peer, (*here, peers, at), ("podSelector", "namespaceSelector", "ipBlock"))
        for key in ("podSelector", "namespaceSelector"):
            if key in peer and not peer[key].get("matchLabels"):
                yield (*here, peers, at, key), f"an empty {key} is all of them; name labels"
        if not peer:
            yield (*here, peers, at), "an empty peer is everybody; name labels"
    for at, port in enumerate(rule.get("ports", [])):
        yield from _port((*here, "ports", at), port)


def _port(here: Keys, port: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _known(port, here, ("port", "endPort", "protocol"))
    if port.get("protocol") not in ("TCP", "UDP", "SCTP") or not 0 < int(port.get("port", 0)) < 65536:
        yield here, "a port has a number of 1 to 65535, and the protocol TCP, UDP or SCTP"


def _known(data: Mapping[str, Any], here: Keys, known: tuple[str, ...]) -> Iterator[Finding]:
    for key in data:
        if key not in known:
            yield (*here, key), f"unknown key {key!r}{nearest(key, known)}"


def _words(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())


def _cluster(body: Mapping[str, Any]) -> Iterator[Finding]:
    for key, text in _GATED.items():
        if key in body:
            yield (key,), f"{key}: {text}"
    if "upgradeStrategy" in body and body["upgradeStrategy"].get("type") not in ("Recreate", "None", None):
        yield ("upgradeStrategy", "type"), "upgradeStrategy.type is Recreate or None"
    if not body.get("enableInTreeAutoscaling"):
        yield ("enableInTreeAutoscaling",), "without the autoscaler, pools stay as they are; leave it on"
    options = body.get("autoscalerOptions", {})
    if options.get("version") != "v2":
        yield ("autoscalerOptions", "version"), "priority and idle timeout of a pool need the autoscaler's version v2"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield ("autoscalerOptions", "idleTimeoutSeconds"), "idleTimeoutSeconds must not be negative"
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in _variables(options):
        yield ("autoscalerOptions", "env"), "KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's own"
    yield from _redis(body)


def _redis(body: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with settings of Redis: they belong into gcsFaultToleranceOptions."""
    head = body["headGroupSpec"]
    containers = head["template"]["spec"].get("containers") or [{}]
    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", _V2):
        if name in _variables(containers[0]):
            place = "autoscalerOptions.version" if name == _V2 else "gcsFaultToleranceOptions"
            path: Keys = ("headGroupSpec", "template", "spec", "containers", 0, "env")
            yield path, f"{name} is not set in the head's container but by {place}"
    for name in ("redis-password", "redis-username"):
        if name in head.get("rayStartParams", {}):
            yield ("headGroupSpec", "rayStartParams", name), f"{name} belongs into gcsFaultToleranceOptions"


def _auth(body: Mapping[str, Any]) -> Iterator[Finding]:
    options = body.get("authOptions", {})
    if options.get("mode") != "token":
        yield (
            ("authOptions", "mode"),
            "authOptions.mode must be token: without one, everybody who reaches it may run code",
        )
    if options.get("enableK8sTokenAuth"):
        yield ("authOptions", "enableK8sTokenAuth"), "enableK8sTokenAuth does not work with RayJob nor with a Secret"
    version = re.match(r"(\d+)\.(\d+)", str(body.get("rayVersion", "")))
    if not version or (int(version[1]), int(version[2])) < (2, 56):
        yield ("rayVersion",), "priority needs a rayVersion of 2.56 or later, and a token one of 2.52"


def _groups(body: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _group(("headGroupSpec",), body["headGroupSpec"])
    for at, group in enumerate(body["workerGroupSpecs"]):
        here = ("workerGroupSpecs", at)
        yield from _group(here, group)
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 0)
        if not 0 <= least <= most:
            yield (*here, "minReplicas"), f"minReplicas {least} is not between 0 and maxReplicas {most}"
        if group.get("idleTimeoutSeconds", 0) < 0:
            yield (*here, "idleTimeoutSeconds"), "idleTimeoutSeconds must not be negative"
        if group.get("suspend"):
            yield (*here, "suspend"), "a group cannot be suspended where an autoscaler runs"


def _held(body: Mapping[str, Any], labels: Mapping[str, str]) -> Iterator[Finding]:
    """Yield which pods the NetworkPolicy does not hold: it tells them by a label."""
    groups: list[tuple[Keys, Any]] = [
        (("workerGroupSpecs", at), each) for at, each in enumerate(body["workerGroupSpecs"])
    ]
    wanted = {LABEL: labels[LABEL]}
    for here, group in ((("headGroupSpec",), body["headGroupSpec"]), *groups):
        if not wanted.items() <= group["template"].get("metadata", {}).get("labels", {}).items():
            path = (*here, "template", "metadata", "labels", LABEL)
            yield path, f"without the label {_words(wanted)} the NetworkPolicy does not hold this pod; keep it"


def _group(here: Keys, group: Mapping[str, Any]) -> Iterator[Finding]:
    pod = group["template"].get("spec", {})
    start = group.get("rayStartParams", {})
    if not pod.get("containers"):
        yield (*here, "template"), "a group needs a container"
    if group.get("resources") and any(start.get(key) for key in _STARTED):
        yield (*here, "resources"), "resources stand in rayStartParams, and cannot stand here, too"
    if "labels" in start:
        yield (*here, "rayStartParams", "labels"), "labels stand beside rayStartParams, not in it"
    if pod.get("restartPolicy") not in (None, "", "Never"):
        yield (*here, "template", "spec", "restartPolicy"), "restartPolicy must be Never: Ray replaces pods itself"
    for key, value in group.get("labels", {}).items():
        if not LABEL_NAME.fullmatch(key.rpartition("/")[2]) or (value and not LABEL_NAME.fullmatch(value)):
            yield (*here, "labels", key), f"{key}={value} is no label: up to 63 letters, digits, -, _ and . in each"
    yield from _safe((*here, "template", "spec"), pod)
    if group.get("headService", {}).get("spec", {}).get("type") in ("LoadBalancer", "NodePort"):
        yield (*here, "headService"), "the head's service must not be reachable from outside; use kubectl port-forward"


def _safe(here: Keys, pod: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what gives a pod more than it needs."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield (*here, key), f"{key} takes the walls around a pod away; remove it"
    for at, container in enumerate(pod.get("containers", [])):
        security = container.get("securityContext", {})
        for key in ("privileged", "allowPrivilegeEscalation"):
            if security.get(key):
                yield (*here, "containers", at, "securityContext", key), f"{key} makes a container the machine's master"


def _variables(container: Mapping[str, Any]) -> set[str]:
    return {each["name"] for each in container.get("env", [])}
