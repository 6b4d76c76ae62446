"""What must hold of a `ray up` file and what Ray's own schema lets through: typos, bounds, labels, and open doors.

In: plain data. Out: where in them something is wrong, and a sentence.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from elastrain.cluster.schemas import Finding, arm_parameters
from elastrain.spec.cluster import LABEL_NAME
from elastrain.spec.problems import Keys, nearest, shown

# The keys that Ray's providers read.
_COMMON = ("type", "cache_stopped_nodes", "use_internal_ips", "disable_node_updaters")
_PROVIDER = {
    "aws": ("region", "availability_zone", "security_group", "key_pair", "aws_credentials", "cloudwatch"),
    "gcp": ("region", "availability_zone", "project_id", "gcp_credentials"),
    "azure": (
        *("location", "resource_group", "subscription_id", "availability_zone", "subnet_mask", "tags", "unique_id"),
        *("msi_name", "msi_resource_group", "use_external_head_ip"),
    ),
    "local": ("head_ip", "worker_ips", "external_head_ip", "coordinator_address"),
}
# The parameters of boto3's `create_instances`, but for those that Ray sets.
_AWS_NODE = (
    *("BlockDeviceMappings", "ImageId", "InstanceType", "Ipv6AddressCount", "Ipv6Addresses", "KernelId", "KeyName"),
    *(
        "Monitoring",
        "Placement",
        "RamdiskId",
        "SecurityGroupIds",
        "SecurityGroups",
        "SubnetIds",
        "SubnetId",
        "UserData",
    ),
    *("AdditionalInfo", "DisableApiTermination", "EbsOptimized", "IamInstanceProfile", "NetworkInterfaces"),
    *("InstanceInitiatedShutdownBehavior", "PrivateIpAddress", "ElasticGpuSpecification", "TagSpecifications"),
    *("LaunchTemplate", "InstanceMarketOptions", "CreditSpecification", "CpuOptions", "HibernationOptions"),
    *("CapacityReservationSpecification", "LicenseSpecifications", "MetadataOptions", "EnclaveOptions"),
    *("PrivateDnsNameOptions", "MaintenanceOptions", "DisableApiStop", "NetworkPerformanceOptions"),
)
# Fields of an instance of Compute Engine, and of a TPU node.
_GCP_NODE = (
    *("machineType", "disks", "networkInterfaces", "serviceAccounts", "metadata", "scheduling", "guestAccelerators"),
    *("resourcePolicies", "shieldedInstanceConfig", "confidentialInstanceConfig", "labels", "tags", "minCpuPlatform"),
    *(
        "canIpForward",
        "reservationAffinity",
        "advancedMachineFeatures",
        "networkPerformanceConfig",
        "deletionProtection",
    ),
    *("displayDevice", "sourceMachineImage", "description", "hostname", "params", "acceleratorType", "runtimeVersion"),
    *("acceleratorConfig", "networkConfig", "serviceAccount", "schedulingConfig", "dataDisks", "cidrBlock"),
)


def launcher_findings(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a `ray up` file that already fits Ray's schema."""
    kind = data["provider"]["type"]
    yield from _unknown(data["provider"], ("provider",), (*_COMMON, *_PROVIDER[kind]))
    if data.get("upscaling_speed", 1) <= 0:
        yield ("upscaling_speed",), "upscaling_speed 0 never starts a node; leave it out"
    yield from _started(data)
    yield from _closed(data)
    if kind == "local":
        return
    types = data["available_node_types"]
    if data.get("head_node_type") not in types:
        yield ("head_node_type",), f"head_node_type {shown(data.get('head_node_type'))} is none of the node types"
    if sum(each.get("min_workers", 0) for each in types.values()) > data["max_workers"]:
        yield ("max_workers",), f"max_workers {data['max_workers']} is less than the nodes that are always up"
    for name, each in types.items():
        here = ("available_node_types", name)
        yield from _node_type(here, each)
        yield from _node_config(kind, (*here, "node_config"), each["node_config"])


def _node_type(here: Keys, each: Mapping[str, Any]) -> Iterator[Finding]:
    if each.get("min_workers", 0) > each.get("max_workers", 0):
        text = f"min_workers {each['min_workers']} is more than max_workers {each.get('max_workers', 0)}"
        yield (*here, "min_workers"), text
    if each.get("idle_timeout_s", 1) <= 0:
        yield (*here, "idle_timeout_s"), "idle_timeout_s must be more than 0"
    for key, value in each.get("labels", {}).items():
        if not LABEL_NAME.fullmatch(key.rpartition("/")[2]) or (value and not LABEL_NAME.fullmatch(value)):
            text = f"{key}={value} is no label: up to 63 letters, digits, -, _ and . in each"
            yield (*here, "labels", key), text


def _node_config(kind: str, here: Keys, config: Mapping[str, Any]) -> Iterator[Finding]:
    if kind == "aws":
        yield from _unknown(config, here, _AWS_NODE)
        for key in ("SecurityGroupIds", "IamInstanceProfile"):
            if not config.get(key):
                yield (*here, key), f"without {key}, Ray makes one that is open to everybody or may do everything"
    elif kind == "gcp":
        yield from _unknown(config, here, _GCP_NODE)
        for at, interface in enumerate(config.get("networkInterfaces", [])):
            if "accessConfigs" in interface:
                yield (*here, "networkInterfaces", at), "accessConfigs gives the node a public address; remove it"
    else:
        yield from _unknown(config, here, ("azure_arm_parameters", "tags"))
        arm = config.get("azure_arm_parameters", {})
        yield from _unknown(arm, (*here, "azure_arm_parameters"), (*sorted(arm_parameters()), "availability_zone"))


def _started(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with how containers are started: Ray asks nobody for a token unless each is told to."""
    docker = data.get("docker", {})
    if not docker.get("image") or not docker.get("container_name"):
        yield ("docker",), "docker needs image and container_name"
    options = [str(each) for each in docker.get("run_options", [])]
    for setting in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH="):
        if not any(setting in each for each in options):
            yield ("docker", "run_options"), f"without --env {setting}… Ray lets everybody in; keep it"
    for name in ("head_start_ray_commands", "worker_start_ray_commands", "setup_commands"):
        if data.get(name) is None:
            yield (name,), f"without {name}, Ray takes commands of its own"


def _closed(data: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what would open a cluster: addresses for everybody, a dashboard beyond the machine, public addresses."""
    for path, text in _texts(data):
        if "0.0.0.0" in text or "::/0" in text:  # noqa: S104 -- looked for, not bound
            yield path, "this is open to every address; name the one that is meant, 127.0.0.1 for a tunnel"
    head = " ".join(str(each) for each in data.get("head_start_ray_commands") or [])
    if "--dashboard-host=127.0.0.1" not in head:
        yield ("head_start_ray_commands",), "keep --dashboard-host=127.0.0.1: `ray dashboard` makes the tunnel"
    provider = data["provider"]
    if provider["type"] != "local" and provider.get("use_internal_ips") is not True:
        yield ("provider", "use_internal_ips"), "use_internal_ips false gives nodes public addresses; leave it true"
    if provider["type"] != "local" and provider.get("cache_stopped_nodes") is not False:
        yield ("provider", "cache_stopped_nodes"), "cache_stopped_nodes keeps ended nodes, whose disks cost; remove it"


def _unknown(config: Mapping[str, Any], here: Keys, known: tuple[str, ...]) -> Iterator[Finding]:
    for key in config:
        if key not in known:
            yield (*here, key), f"unknown key {key!r}{nearest(key, known)}"


def _texts(data: Any, keys: Keys = ()) -> Iterator[tuple[Keys, str]]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _texts(value, (*keys, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _texts(value, (*keys, index))
    elif isinstance(data, str):
        yield keys, data
