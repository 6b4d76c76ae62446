"""A spec as the YAML of `ray up`: for EC2, Compute Engine, Azure and hosts of your own. Pure: data in, data out.

Every key that Ray would fill with a default of its own is given: its defaults install a nightly Ray, listen on all
addresses, open SSH to everybody and keep ended nodes.
"""

import shlex
from typing import Any

from elastrain.cluster.clouds import aws_node, aws_provider, azure_node, azure_provider, gcp_node, gcp_provider
from elastrain.cluster.environment import AUTHORITY_DIR, MAKE_CERTIFICATE, NO_EXPORTERS, TLS_DIR, tls_variables
from elastrain.cluster.merging import merged
from elastrain.spec.cluster import ClusterSpec, Head, Mount, Pool
from elastrain.spec.providers import Aws, Azure, Gcp, KubeRay, Local, OnPrem

TOKEN_DIR = "/home/ray/.elastrain"  # noqa: S105 -- a folder
# Ray starts this share of the running nodes at once, at least one; the default of 1 would boot a gang node by node.
_UPSCALING_SPEED = 100.0
_HEAD_START = (
    "umask 077; ulimit -n 65536; ray start --head --port=6379 --object-manager-port=8076 "
    "--autoscaling-config=~/ray_bootstrap_config.yaml --dashboard-host=127.0.0.1 --num-cpus=0 --num-gpus=0 "
    "--disable-usage-stats"
)
_WORKER_START = "umask 077; ulimit -n 65536; ray start --address=$RAY_HEAD_IP:6379 --object-manager-port=8076"
_WAIT_FOR_DRIVER = "timeout 600 bash -c 'until nvidia-smi; do sleep 3; done'"


def launcher_file(spec: ClusterSpec) -> dict[str, Any]:
    """Return what `ray up` is given. The provider is one of machines, neither kuberay nor local."""
    provider = spec.provider
    assert not isinstance(provider, KubeRay | Local)
    found: dict[str, Any] = {"cluster_name": spec.name}
    if isinstance(provider, OnPrem):
        hosts = list(spec.pools[0].hosts)
        found |= {
            "max_workers": len(hosts),
            "provider": {"type": "local", "head_ip": provider.head_host, "worker_ips": hosts},
        }
    else:
        types = {"head": _head_type(spec), **{pool.name: _pool_type(spec, pool) for pool in spec.pools}}
        found |= {
            "max_workers": sum(pool.most for pool in spec.pools),
            "upscaling_speed": _UPSCALING_SPEED,
            "provider": _provider(spec),
            "head_node_type": "head",
            "available_node_types": types,
        }
    found |= {
        "idle_timeout_minutes": 5,
        "auth": _auth(provider),
        "docker": _docker(spec),
        "file_mounts": {TOKEN_DIR: provider.token_dir} | ({AUTHORITY_DIR: spec.tls.folder} if spec.tls else {}),
        **_commands(spec),
    }
    return dict(merged(found, spec.override))


def _provider(spec: ClusterSpec) -> dict[str, Any]:
    provider = spec.provider
    if isinstance(provider, Aws):
        return aws_provider(provider)
    if isinstance(provider, Gcp):
        return gcp_provider(provider)
    assert isinstance(provider, Azure)
    return azure_provider(provider, spec.head.identity or "")


def _node(spec: ClusterSpec, machine: Head | Pool) -> dict[str, Any]:
    provider = spec.provider
    if isinstance(provider, Aws):
        return aws_node(provider, machine)
    if isinstance(provider, Gcp):
        return gcp_node(provider, machine)
    assert isinstance(provider, Azure)
    return azure_node(provider, machine)


def _head_type(spec: ClusterSpec) -> dict[str, Any]:
    found = {
        "resources": {"CPU": 0},
        "labels": {"ray.io/node-group": "head", **spec.offers()},
        "max_workers": 0,
        "node_config": _node(spec, spec.head),
    }
    return dict(merged(found, spec.head.override))


def _pool_type(spec: ClusterSpec, pool: Pool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "resources": pool.resources(),
        "labels": pool.node_labels(),
        "min_workers": pool.least,
        "max_workers": pool.most,
        "priority": pool.priority,
        "idle_timeout_s": pool.idle_timeout_s,
        "node_config": _node(spec, pool),
    }
    if pool.mounts:
        found["docker"] = {"worker_run_options": _volumes(pool.mounts)}
    if pool.accelerator and pool.accelerator.resource == "GPU":
        found["initialization_commands"] = [_WAIT_FOR_DRIVER]
    return dict(merged(found, pool.override))


def _auth(provider: Aws | Gcp | Azure | OnPrem) -> dict[str, Any]:
    found = {"ssh_user": provider.ssh_user}
    if provider.ssh_private_key:
        found["ssh_private_key"] = provider.ssh_private_key
    if isinstance(provider, Azure):
        found["ssh_public_key"] = provider.ssh_public_key
    return found


def _docker(spec: ClusterSpec) -> dict[str, Any]:
    settings = {**NO_EXPORTERS, **spec.env, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{TOKEN_DIR}/auth_token"}
    settings |= tls_variables(TLS_DIR) if spec.tls else {}
    env = [f"--env {shlex.quote(f'{name}={value}')}" for name, value in settings.items()]
    found: dict[str, Any] = {
        "image": spec.image,
        "container_name": "elastrain",
        "pull_before_run": True,
        "run_options": ["--ulimit nofile=65536:65536", *env],
    }
    if spec.head.mounts:
        found["head_run_options"] = _volumes(spec.head.mounts)
    if isinstance(spec.provider, OnPrem) and spec.pools[0].mounts:
        found["worker_run_options"] = _volumes(spec.pools[0].mounts)
    return found


def _volumes(mounts: tuple[Mount, ...]) -> list[str]:
    return [f"-v {mount.host}:{mount.path}{':ro' if mount.read_only else ''}" for mount in mounts]


def _commands(spec: ClusterSpec) -> dict[str, Any]:
    """Return the commands; an empty list where there are none, since Ray would put its own in place of nothing."""
    none = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    worker = _WORKER_START
    watched = [pool.name for pool in spec.pools if pool.spot]
    if isinstance(spec.provider, OnPrem):
        # Hosts have no node type that could tell Ray what they are; they tell it themselves.
        pool = spec.pools[0]
        labels = ",".join(f"{key}={value}" for key, value in pool.node_labels().items())
        gpus = pool.accelerator.count if pool.accelerator else 0
        worker += f" --num-cpus={pool.cpus} --num-gpus={gpus} --labels={shlex.quote(labels)}"
    return {
        **{name: [] for name in none},
        "head_start_ray_commands": ["ray stop", *_certified(spec), _HEAD_START],
        "worker_start_ray_commands": [
            *("ray stop", *_certified(spec), worker),
            *([_watch(spec, watched)] if watched else []),
        ],
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def _watch(spec: ClusterSpec, pools: list[str]) -> str:
    """Return what starts the watcher for the cloud's notice beside Ray on the nodes of `pools`, and lets it run."""
    watcher = f"nohup python -m elastrain.cluster.preemption {spec.provider.type} --address $RAY_HEAD_IP:6379"
    # The commands are those of all node types; Ray tells each node its own.
    return (
        f"umask 077; case $RAY_NODE_TYPE_NAME in {'|'.join(pools)}) "
        f"{watcher} </dev/null >/tmp/elastrain-preemption.log 2>&1 & ;; esac"
    )


def _certified(spec: ClusterSpec) -> list[str]:
    """Return what makes a node's certificate; hosts of one's own are called by the names that the spec has for them."""
    if not spec.tls:
        return []
    provider = spec.provider
    hosts = [provider.head_host, *spec.pools[0].hosts] if isinstance(provider, OnPrem) else []
    return [" ".join([MAKE_CERTIFICATE, *(f"--host {host}" for host in hosts)])]
