"""A spec as files: what `ray up` or `kubectl apply` is given, by file name, as plain data and as YAML."""

import io
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from elastrain.cluster.kuberay import network_policy, raycluster, rayjob
from elastrain.cluster.ray_up import launcher_file
from elastrain.errors import StorageError
from elastrain.spec.cluster import ClusterSpec
from elastrain.spec.providers import KubeRay, Local

# Ray and Kubernetes read YAML 1.1, in which these words and what begins like a number may be no text.
_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "~", "", "=", "<<"}


class _Representer(SafeRepresenter):
    """Writes text that any version of YAML reads as text, and what stands twice in full."""

    def represent_str(self, data: str) -> Any:
        """Return the node of a text."""
        plain = data.lower() not in _WORDS and data[:1] not in "0123456789+-." and data.isprintable()
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 -- ruamel's own
        """Say that nothing is written as a reference."""
        return True


_Representer.add_representer(str, _Representer.represent_str)


def manifests(spec: ClusterSpec) -> dict[str, dict[str, Any]]:
    """Return what is rendered, by the name of its file.

    `NAME.yaml` for machines; `NAME-raycluster.yaml`, `-networkpolicy` and, with a job, `-rayjob` for Kubernetes; none
    for local, which `elastrain cluster local` starts.
    """
    provider = spec.provider
    if isinstance(provider, Local):
        return {}
    if not isinstance(provider, KubeRay):
        return {f"{spec.name}.yaml": launcher_file(spec)}
    found = {f"{spec.name}-raycluster.yaml": raycluster(spec), f"{spec.name}-networkpolicy.yaml": network_policy(spec)}
    if provider.job:
        found[f"{spec.name}-rayjob.yaml"] = rayjob(spec)
    return found


def as_yaml(data: Mapping[str, Any], *, spec_name: str, command: str = "elastrain cluster render") -> str:
    """Return plain data as YAML that says from which spec it comes, and by which command."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # ruamel types it as None only
    yaml.width = 1 << 30  # one line a text, for diff and grep
    stream = io.StringIO()
    yaml.dump(dict(data), stream)
    return f"# Made by `{command}` from the spec of {spec_name}; change that and render again.\n" + (stream.getvalue())


def next_steps(spec: ClusterSpec, paths: Sequence[str]) -> list[str]:
    """Return the commands that start what was rendered to `paths`, and the tunnel to its dashboard."""
    if not isinstance(spec.provider, KubeRay):
        (path,) = (shlex.quote(path) for path in paths)
        return [f"ray up --no-config-cache {path}", f"ray dashboard {path}"]
    lasting = [shlex.quote(path) for path in paths if not path.endswith("-rayjob.yaml")]
    return [
        f"kubectl apply {' '.join(f'-f {path}' for path in lasting)}",
        f"kubectl -n {spec.provider.namespace} port-forward service/{spec.name}-head-svc 8265:8265",
    ]


def write(spec: ClusterSpec, folder: str) -> list[str]:
    """Write the files into `folder`, which is made where it is missing, and return their paths; raises StorageError."""
    paths = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, data in manifests(spec).items():
            path = Path(folder) / name
            path.write_text(as_yaml(data, spec_name=spec.name), encoding="utf-8")
            paths.append(str(path))
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror}") from None
    return paths
