"""`cluster check` catches what is wrong, says at which line, and needs neither Ray nor the network."""

import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastrain.cluster.kuberay import network_policy
from elastrain.spec.cluster import ClusterSpec
from elastrain.spec.source import parse

CLUSTERS = Path(__file__).parents[2] / "clusters"
SPECS = ("aws", "azure", "gcp", "kuberay", "onprem", "local-autoscaling/cluster")
Find = Callable[..., list[str]]
NUM_MUTATIONS = 20  # of each of the six specs
# Mappings whose keys are the user's own, so that a typo in one is another key and no mistake.
FREE = ("labels", "env", "spot_nodes")


def text_of(name: str) -> str:
    return (CLUSTERS / f"{name}.yaml").read_text(encoding="utf-8")


def put(name: str, old: str, new: str) -> str:
    text = text_of(name)
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize("name", SPECS)
def test_the_shipped_specs_are_sound(name: str, problems: Find) -> None:
    assert problems(text_of(name)) == []


# --- mutations


def scalars(data: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield keys and value of all values that are no mapping and no list."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if isinstance(value, dict | list):
            yield from scalars(value, (*keys, key))
        else:
            yield (*keys, key), value


def misspelt(word: str, rng: random.Random) -> str:
    """Return a word with one letter lost, doubled, swapped or changed."""
    at = rng.randrange(len(word))
    swapped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
    ways = [word[:at] + word[at + 1 :], word[: at + 1] + word[at:], swapped, word[:at] + "q" + word[at + 1 :]]
    return next(way for way in rng.sample(ways, len(ways)) if way and way != word)


def typo(text: str, rng: random.Random) -> tuple[str, int, str]:
    """Return the text with a misspelt key, its line, and what was done."""
    source = parse(text, name="spec")
    known = [keys for keys in source.lines if keys and not any(name in keys[:-1] for name in FREE)]
    keys = rng.choice([keys for keys in known if isinstance(keys[-1], str)])
    line, column = source.lines[keys]
    key = str(keys[-1])
    word = misspelt(key, rng)
    lines = text.splitlines(keepends=True)
    old = lines[line - 1]
    assert old[column - 1 :].startswith(key)
    lines[line - 1] = old[: column - 1] + word + old[column - 1 + len(key) :]
    return "".join(lines), line, f"{key} -> {word}"


def replaced(text: str, keys: tuple[Any, ...], value: str) -> tuple[str, int]:
    """Return the text with another value at `keys`, and the line."""
    line, column = parse(text, name="spec").lines[keys]
    lines = text.splitlines(keepends=True)
    old = lines[line - 1]
    head, key, rest = old[: column - 1], str(keys[-1]), old[column - 1 :]
    assert rest.startswith(f"{key}:"), rest
    end = re.match(r"[^:]+:\s*(\"[^\"]*\"|[^,}#\n]*)", rest)
    assert end
    lines[line - 1] = f"{head}{key}: {value}{rest[end.end() :]}"
    return "".join(lines), line


def wrong_type(text: str, rng: random.Random) -> tuple[str, int, str]:
    """Return the text with a value of another type than it has."""
    source = parse(text, name="spec")
    spots = [(keys, value) for keys, value in scalars(source.data) if isinstance(keys[-1], str)]
    # An alias's value stands elsewhere; the inner mapping of `override` is only known where Ray or Kubernetes knows it.
    spots = [(keys, value) for keys, value in spots if "*" not in text.splitlines()[source.lines[keys][0] - 1]]
    spots = [(keys, value) for keys, value in spots if "override" not in keys]
    keys, value = rng.choice(spots)
    new = rng.choice(["{a: 1}", "[[1]]", "many" if not isinstance(value, str) else "[1, 2]"])
    mutated, line = replaced(text, keys, new)
    return mutated, line, f"{keys} = {new}"


def inverted(text: str, rng: random.Random) -> tuple[str, int, str]:
    """Return the text with bounds the wrong way round or a number that is out of range."""
    source = parse(text, name="spec")
    numbers = [keys for keys, value in scalars(source.data) if isinstance(value, int) and not isinstance(value, bool)]
    keys = rng.choice([keys for keys in numbers if "override" not in keys and keys[-1] != "priority"])
    if keys[-1] == "max":
        mutated, line = replaced(text, keys, "1")
        lines = mutated.splitlines(keepends=True)
        lines.insert(line - 1, f"{' ' * (source.lines[keys][1] - 1)}min: 2\n")
        return "".join(lines), line, f"{keys}: min 2, max 1"
    new = rng.choice(["0", "-1", "99999999"] if keys[-1] in ("cpus", "memory_gib", "count") else ["0", "-1"])
    if keys[-1] in ("cpus", "memory_gib") and new == "99999999" and not knows_type(source.data, keys):
        new = "0"
    mutated, line = replaced(text, keys, new)
    return mutated, line, f"{keys} = {new}"


def knows_type(data: Any, keys: tuple[Any, ...]) -> bool:
    """Say whether the table of types knows the machine, and so its size."""
    for key in keys[:-1]:
        data = data[key]
    return "instance" in data or "hosts" in data


def unknown_name(text: str, rng: random.Random) -> tuple[str, int, str]:
    """Return the text with a name that nobody knows: an accelerator, an instance, a market, a provider."""
    source = parse(text, name="spec")
    named = [
        (keys, value)
        for keys, value in scalars(source.data)
        if keys[-1] in ("type", "instance", "market", "image") and "override" not in keys
    ]
    keys, value = rng.choice(named)
    new = {"image": "no tag"}.get(keys[-1], misspelt(str(value), rng) + "x")
    mutated, line = replaced(text, keys, new)
    return mutated, line, f"{keys} = {new}"


KINDS = (typo, typo, wrong_type, inverted, unknown_name)


@pytest.mark.parametrize("name", SPECS)
def test_each_mutation_is_caught_at_its_line(name: str, problems: Find) -> None:
    """120 mutations by seed, 20 of each spec: typos at each level, wrong types, bounds, names that nobody knows."""
    for seed in range(NUM_MUTATIONS):
        rng = random.Random(f"{name} {seed}")  # noqa: S311 -- a mutation, no key
        mutated, line, what = KINDS[seed % len(KINDS)](text_of(name), rng)
        found = problems(mutated)
        assert found, f"{name} {seed}: {what} in line {line} is not seen"
        assert f"{line}" in {each.split(":")[0] for each in found}, f"{name} {seed}: {what} in line {line}: {found}"


# --- what users get wrong

IDLE = "idle_timeout_minutes: 10"
OPTIONS = "autoscalerOptions:\n    idleTimeoutSeconds: 600"
SSH = "{FromPort: 22, ToPort: 22, IpProtocol: TCP, IpRanges: [{CidrIp: 0.0.0.0/0}]}"
START = "name: onprem\noverride: {head_start_ray_commands: ['ray start --head --dashboard-host=0.0.0.0']}"
TOKENS = "--env RAY_AUTH_MODE=token, --env RAY_AUTH_TOKEN_PATH=/x"
DISABLED = "-e RAY_AUTH_MODE='disabled'"
VARIABLE = "{name: RAY_AUTH_MODE, value: disabled}"
REFERENCE = "{name: RAY_AUTH_MODE, valueFrom: {secretKeyRef: {name: x, key: mode}}}"
OPEN = "RAY_AUTH_MODE is set to what would let strangers in"
STRAY = "{labels: {elastrain/cluster: x}}"
LABELS = "without the label elastrain/cluster=kuberay the NetworkPolicy does not hold this pod"
WORKER = "    identity: arn:aws:iam::000000000000:instance-profile/elastrain-worker\n"


@pytest.mark.parametrize(
    ("name", "old", "new", "expected"),
    [
        ("aws", "type: aws", "type: asw", "onprem, kuberay, local, got 'asw'; did you mean 'aws'"),
        ("aws", "type: H100", "type: H1000", "Ray knows no accelerator 'H1000'; did you mean 'H100'"),
        ("aws", "p5.48xlarge", "p5.48xlarg", "no 'p5.48xlarg' on aws; did you mean 'p5.48xlarge'"),
        ("aws", "{type: A100, count: 8}", "{type: A100, count: 4}", "p4d.24xlarge holds 8 A100"),
        ("aws", "    accelerator: {type: T4, count: 1}\n", "", "holds 1 T4: say so with accelerator"),
        ("aws", "max: 8\n    priority", "max: 2\n    min: 3\n    priority", "min 3 is more than max 2"),
        ("aws", "{team: research}", "{team: 'two words'}", "'two words' is no value"),
        ("aws", "{team: research}", "{ray.io/market-type: x}", "is Ray's own"),
        ("aws", WORKER, "", "missing key 'identity'"),
        ("aws", "max: 8", "max: 8\n    hosts: [a]", "hosts are for onprem"),
        ("aws", IDLE, "upscaling_speed: 0", "upscaling_speed 0 never starts a node"),
        ("aws", IDLE, "provider: {cache_stopped_node: true}", "did you mean 'cache_stopped_nodes'"),
        ("aws", IDLE, "provider: {cache_stopped_nodes: true}", "whose disks cost"),
        ("aws", IDLE, "idle_timeout_minute: 10", "did you mean 'idle_timeout_minutes'"),
        ("aws", IDLE, "docker: {run_options: []}", "Ray lets everybody in"),
        ("aws", IDLE, "head_start_ray_commands: [ray start --head]", "--dashboard-host=127.0.0.1"),
        ("aws", "CpuOptions:", "CpuOption:", "unknown key 'CpuOption'; did you mean 'CpuOptions'"),
        ("aws", "    override:\n", "    override:\n      min_workers: 9\n", "min_workers 9 is more than max_workers 8"),
        ("aws", "    override:\n", "    override:\n      labels: {a: 'b c'}\n", "a=b c is no label"),
        ("aws", "    override:\n", "    override:\n      resources: {GPU: 0.5}\n", "expected a whole number, got 0.5"),
        ("aws", "    override:\n", "    override:\n      spot: true\n", "unknown key 'spot'"),
        ("aws", IDLE, "provider: {use_internal_ips: false}", "gives nodes public addresses"),
        ("aws", IDLE, "docker: {run_options: ['-p 0.0.0.0:8265:8265']}", "this is open to every address"),
        ("aws", IDLE, f"provider: {{security_group: {{IpPermissions: [{SSH}]}}}}", "this is open to every address"),
        ("aws", IDLE, "head_start_ray_commands: ['ray start --head --dashboard-host=::']", "keep --dashboard-host=127"),
        ("onprem", "name: onprem", START, "this is open to every address"),
        ("gcp", "    identity: ", "    # ", "missing key 'identity'"),
        ("azure", "    identity: ", "    # ", "missing key 'identity'"),
        ("kuberay", "    identity: ", "    # ", "missing key 'identity'"),
        ("aws", IDLE, "setup_commands: null", "expected a list, got nothing"),
        ("aws", IDLE, "max_workers: null", "expected a whole number, got nothing"),
        ("kuberay", "      template:\n", "      minReplicas: 9\n      template:\n", "minReplicas 9 is not between"),
        ("kuberay", "      template:\n", "      rayStartParams: {labels: a=b}\n      template:\n", "not in it"),
        ("aws", "CpuOptions: {ThreadsPerCore: 1}", "SecurityGroupIds: []", "open to everybody"),
        ("azure", "enableAccelerated", "enableAccelerate", "did you mean 'enableAcceleratedNetworking'"),
        ("azure", "identity: *identity", "identity: other", "Ray gives all nodes on azure one identity"),
        ("gcp", "    machine_image: v2-alpha-tpuv6e\n", "", "the TPU's runtime"),
        ("onprem", "    cpus: 192", "    max: 4\n    cpus: 192", "all of them stay up"),
        ("onprem", "    cpus: 192", "    cpus: 1920", "1920 is more than the 224"),
        ("kuberay", "idleTimeoutSeconds", "idleTimeoutSecond", "did you mean 'idleTimeoutSeconds'"),
        ("kuberay", "    idleTimeoutSeconds: 600", "    upscalingMode: Fast", "expected one of Default, Aggressive"),
        ("kuberay", "priorityClassName: research", "restartPolicy: Always", "restartPolicy must be Never"),
        ("kuberay", "priorityClassName: research", "hostNetwork: true", "takes the walls around a pod away"),
        ("kuberay", "priorityClassName", "priorityClasName", "did you mean 'priorityClassName'"),
        ("kuberay", OPTIONS, "networkPolicy: {mode: DenyAll}", "shut by default"),
        ("kuberay", OPTIONS, "authOptions: {mode: disabled}", "must be token"),
        ("kuberay", OPTIONS, "rayVersion: '2.40'", "2.56 or later"),
        ("kuberay", ", topology: 2x4", "", "missing key 'topology'"),
        ("kuberay", "  spot_nodes: {cloud.google.com/gke-spot: \"true\"}\n", "", "missing key 'provider.spot_nodes'"),
        ("kuberay", "\nimage:", "\ntls: {folder: x}\nimage:", "on kuberay tls has the key 'secret_name', and nothing"),
        ("aws", "\nimage:", "\ntls: {}\nimage:", "on aws tls has the key 'folder', and nothing else"),
        ("kuberay", "claim: datasets}", "claim: datasets, host: /x}", "give exactly one of host, claim, scratch_gib"),
        ("kuberay", "\nhead:", "\nenv: {RAY_AUTH_MODE: disabled}\nhead:", "RAY_AUTH_MODE says who is let in"),
        ("aws", "env: {NCCL_DEBUG: WARN}", "env: {RAY_USE_TLS: '0'}", "RAY_USE_TLS says who is let in"),
        ("aws", IDLE, f"docker: {{run_options: [{TOKENS}, '--env RAY_AUTH_MODE=disabled']}}", OPEN),
        ("aws", IDLE, "worker_start_ray_commands: ['RAY_AUTH_MODE=disabled ray start']", OPEN),
        ("aws", IDLE, "setup_commands: [unset RAY_AUTH_MODE]", OPEN),
        ("aws", "    override:\n", f"    override:\n      docker: {{worker_run_options: [{DISABLED}]}}\n", OPEN),
        ("kuberay", "priorityClassName: research", f"containers: [{{name: ray-worker, env: [{VARIABLE}]}}]", OPEN),
        ("kuberay", "priorityClassName: research", f"containers: [{{name: ray-worker, env: [{REFERENCE}]}}]", OPEN),
        ("kuberay", OPTIONS, "autoscalerOptions: {env: [{name: RAY_USE_TLS, value: 'false'}]}", "RAY_USE_TLS is set"),
        ("kuberay", "      template:\n", f"      template:\n        metadata: {STRAY}\n", LABELS),
    ],
)  # fmt: skip
def test_mistakes_are_told_as_sentences(name: str, old: str, new: str, expected: str, problems: Find) -> None:
    found = problems(put(name, old, new))
    assert any(expected in each for each in found), found


@pytest.mark.parametrize(
    "env",
    [
        "{HF_TOKEN: abc}",
        "{AWS_SECRET_ACCESS_KEY: abc}",
        "{NOTE: AKIAABCDEFGHIJKLMNOP}",
        "{OPTIONS: '--password=hunter2'}",
        "{OPTIONS: 'serve --api-key hunter2'}",
        "{OPTIONS: 'serve --auth-token=hunter2'}",
        "{STORE: 's3://key:secret@bucket/x'}",
    ],
)
def test_no_spec_holds_a_secret(env: str, problems: Find) -> None:
    found = problems(put("aws", "env: {NCCL_DEBUG: WARN}", f"env: {env}"))
    assert any("looks like a secret" in each for each in found), found
    assert not any(secret in each for each in found for secret in ("abc", "AKIA", "hunter2", "key:secret"))


def test_a_secret_in_an_override_is_seen_and_a_reference_is_not(problems: Find) -> None:
    command = "override:\n  idle_timeout_minutes: 10"
    assert problems(put("aws", command, "override:\n  setup_commands: ['export WANDB_API_KEY=abc']"))
    variable = "{name: ray-worker, env: [{name: HF_TOKEN, %s}]}"
    change = "          containers: [%s]\n          priorityClassName"
    job = "command: [python, -m, elastrain, train, pipelines/tiny_gpt/train.yaml]"
    (found,) = problems(put("kuberay", job, "command: [python, x.py, --api-key, abc]"))
    assert "api-key looks like a secret" in found
    assert problems(put("kuberay", job, "command: [python, x.py, --tokenizer, bpe, --max-tokens, '8']")) == []
    literal, reference = "value: abc", "valueFrom: {secretKeyRef: {name: hf, key: token}}"
    assert problems(put("kuberay", "          priorityClassName", change % (variable % literal)))
    assert problems(put("kuberay", "          priorityClassName", change % (variable % reference))) == []


Broken = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("breaks", "text"),
    [
        (lambda spec: spec.update(podSelector={}), "must hold the pods with elastrain/cluster=kuberay"),
        (lambda spec: spec["podSelector"]["matchLabels"].update(team="x"), "must hold the pods with"),
        (lambda spec: spec["policyTypes"].remove("Egress"), "a way that is not named is open"),
        (lambda spec: spec["ingress"][0].update({"from": [{"podSelector": {}}]}), "an empty podSelector is all"),
        (lambda spec: spec["ingress"][1]["from"][0].update(namespaceSelector={}), "an empty namespaceSelector is all"),
        (lambda spec: spec["ingress"][1].pop("from"), "without `from` lets everybody in"),
        (lambda spec: spec["ingress"][1].update({"from": [{}]}), "an empty peer is everybody"),
        (lambda spec: spec["ingress"].pop(0), "pods of the cluster must reach each other"),
        (lambda spec: spec["egress"].append({}), "allows everything"),
        (lambda spec: spec["egress"][1]["ports"][0].update(port=0), "a port has a number of 1 to 65535"),
        (lambda spec: spec["egress"][1]["ports"][0].update(protocol="tcp"), "a port has a number of 1 to 65535"),
        (lambda spec: spec.update(egres=[]), "unknown key 'egres'; did you mean 'egress'"),
        (lambda spec: spec["ingress"][1].update(form=[]), "unknown key 'form'; did you mean 'from'"),
    ],
)
def test_a_network_policy_that_is_open_is_caught(
    breaks: Broken, text: str, monkeypatch: pytest.MonkeyPatch, problems: Find
) -> None:
    def broken(spec: ClusterSpec) -> dict[str, Any]:
        made = network_policy(spec)
        breaks(made["spec"])
        return made

    monkeypatch.setattr("elastrain.cluster.render.network_policy", broken)
    found = problems(text_of("kuberay"))
    assert any(text in each for each in found), found


def test_overrides_of_the_command_line_are_to_blame_themselves(problems: Find) -> None:
    (found,) = problems(text_of("aws"), "pools.0.max=0")
    assert found.startswith("--set pools.0.max=0")


def test_a_table_of_ones_own_comes_first(problems: Find, tmp_path: Path) -> None:
    own = "date: 2027-01-01\naws: {x9.huge: {cpus: 32, memory_gib: 128, on_demand_per_h: 1.0}}\n"
    (tmp_path / "own.yaml").write_text(own)
    text = put("aws", "m7i.8xlarge", "x9.huge")
    assert problems(text + "prices: own.yaml\n") == []
    assert "there is no file" in problems(text + "prices: lost.yaml\n")[0]
    (tmp_path / "own.yaml").write_text(own.replace("cpus", "cpu"))
    assert "did you mean 'cpus'" in problems(text + "prices: own.yaml\n")[0]


@pytest.mark.parametrize(("name", "what"), [("aws", "check"), ("kuberay", "check"), ("aws", "render")])
def test_checking_and_rendering_load_neither_ray_nor_torch(name: str, what: str) -> None:
    code = f"""
import sys
from elastrain.__main__ import app
app(["cluster", "{what}", "clusters/{name}.yaml"], standalone_mode=False)
print(*sorted({{"ray", "torch"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CLUSTERS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
