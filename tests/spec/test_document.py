"""A spec read from YAML is the spec that was meant, or one error with a line for each problem."""

import contextlib
import enum
import json
import math
import os
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from elastrain.errors import ElastrainError, SpecError
from elastrain.spec.document import changed, dump, parse_train, read_train, resolve, schema, train_spec
from elastrain.spec.problems import validate
from elastrain.spec.secrets import secrets_in
from elastrain.spec.source import load, override, parse
from elastrain.spec.train import DataSpec, Model, OptimizerSpec, TrainSpec, WorkersSpec

GOOD = """\
kind: train
name: digits-mlp
task: task.py:DigitsMLP
task_args: {hidden: 128}
data:
  train: data/digits/train
  eval: data/digits/test
  global_batch: 64
  slots: 8
  transforms:
    - {name: scale, column: image}
    - name: flip
      column: image
optimizer:
  name: adamw
  lr: 1.0e-3
  betas: [0.9, 0.95]
schedule: {name: cosine, warmup_steps: 50}
budget: {epochs: 10}
workers: {min: 1, max: 4}
storage: runs
"""
SMALL: dict[str, Any] = {
    "name": "small",
    "task": "package.module:Task",
    "data": {"train": "data", "global_batch": 8},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "budget": {"steps": 3},
}
Spec = Callable[..., TrainSpec]
Problems = Callable[..., list[str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `spec/task.py`; the working folder is its `work`."""
    for each in ("spec", "work"):
        (tmp_path / each).mkdir()
    (tmp_path / "spec/task.py").write_text("class DigitsMLP: pass\n")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def read(folder: Path) -> Spec:
    """Read text or bytes as `spec/train.yaml`, with overrides."""

    def read_text(text: str | bytes, *overrides: str) -> TrainSpec:
        path = folder / "spec/train.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_train(path, overrides)

    return read_text


@pytest.fixture
def problems(read: Spec, folder: Path) -> Problems:
    """Read what must fail; return the lines of the error, the folder left out."""

    def read_lines(text: str | bytes, *overrides: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            read(text, *overrides)
        return str(caught.value).replace(f"{folder}/spec/", "").splitlines()

    return read_lines


def put(text: str, old: str, new: str) -> str:
    """Return `text` with its only `old` replaced."""
    assert text.count(old) == 1, old
    return text.replace(old, new)


# --- what is read


def test_a_spec_is_read_with_its_types(read: Spec) -> None:
    spec = read(GOOD)
    assert spec.name == "digits-mlp"
    assert spec.optimizer.lr == 0.001
    assert spec.optimizer.betas == (0.9, 0.95)
    assert spec.task_args == {"hidden": 128}
    assert [transform.name for transform in spec.data.transforms] == ["scale", "flip"]
    assert spec.num_slots == 8
    assert type(spec.optimizer.lr) is float
    assert type(spec.name) is str


def test_yaml_is_version_1_2(read: Spec) -> None:
    values = "{a: 3e-4, b: 0o17, c: yes, d: 2020-01-01, e: 1:30, f: ~, g: [on, 0x1F], h: '3e-4', i: .inf, 3: x}"
    spec = read(put(GOOD, "{hidden: 128}", f"{{values: {values}}}"))
    expected: dict[object, object] = {"a": 0.0003, "b": 15, "c": "yes", "d": "2020-01-01", "e": "1:30", "f": None}
    expected |= {"g": ["on", 31], "h": "3e-4", "i": math.inf, 3: "x"}
    assert spec.task_args["values"] == expected


def test_aliases_and_merges_are_read(read: Spec) -> None:
    spec = read(put(GOOD, "{hidden: 128}", "{a: &a {x: 1, y: 2}, b: {<<: *a, y: 3}, c: [*a], d: {<<: [{z: 4}, *a]}}"))
    assert spec.task_args["b"] == {"x": 1, "y": 3}
    assert spec.task_args["c"] == [{"x": 1, "y": 2}]
    assert spec.task_args["d"] == {"x": 1, "y": 2, "z": 4}


def test_a_byte_order_mark_and_windows_lines_are_read(read: Spec) -> None:
    assert read(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()) == read(GOOD)


# --- paths


def test_paths_are_resolved(read: Spec, folder: Path) -> None:
    spec = read(GOOD)
    assert spec.task == f"{folder}/spec/task.py:DigitsMLP"
    assert spec.data.train == f"{folder}/work/data/digits/train"
    assert spec.data.eval == f"{folder}/work/data/digits/test"
    assert spec.storage == f"{folder}/work/runs"


def test_the_path_of_a_table_is_resolved_too(read: Spec, folder: Path) -> None:
    spec = read(GOOD, "data.train=delta:tables/sales@3", "data.eval=iceberg:s3://bucket/sales@7")
    assert spec.data.train == f"delta:{folder}/work/tables/sales@3"
    assert spec.data.eval == "iceberg:s3://bucket/sales@7"


def test_paths_are_relative_to_the_spec_wherever_it_is_read_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "spec/train.yaml").write_text(GOOD)
    monkeypatch.chdir(folder / "spec")
    spec = read_train("train.yaml", ["task=../spec/./task.py:DigitsMLP", "storage=../out"])
    assert spec.task == f"{folder}/spec/task.py:DigitsMLP"
    assert spec.storage == f"{folder}/out"


@pytest.mark.parametrize("url", ["s3://bucket/x", "memory://x", "file:///x/../y", "abfs://runs@account/x"])
def test_urls_stay(read: Spec, url: str) -> None:
    spec = read(GOOD, f"storage={url}", f"data.train={url}", f"data.eval={url}")
    assert (spec.storage, spec.data.train, spec.data.eval) == (url, url, url)


def test_home_is_expanded(read: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert read(GOOD, "storage=~/runs").storage == "/home/ada/runs"


def test_links_are_kept(read: Spec, folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "work/data").symlink_to(folder / "elsewhere")
    assert read(GOOD).data.train == f"{folder}/work/data/digits/train"


def test_all_code_is_resolved_and_modules_stay(read: Spec, folder: Path) -> None:
    spec = read(
        GOOD,
        "optimizer.name=task.py:Lion",
        "optimizer.phases={critic: {name: task.py:Slow, lr: 0.5}, other: {name: a.b:C}}",
        "data.transforms=[{name: custom, function: task.py:crop}, {name: custom, function: a.b:c}]",
        "task=package.module:Outer.Inner",
    )
    assert spec.optimizer.name == f"{folder}/spec/task.py:Lion"
    assert spec.optimizer.phases["critic"] == {"name": f"{folder}/spec/task.py:Slow", "lr": 0.5}
    assert spec.optimizer.phases["other"] == {"name": "a.b:C"}
    functions = [transform.function for transform in spec.data.transforms if transform.name == "custom"]
    assert functions == [f"{folder}/spec/task.py:crop", "a.b:c"]
    assert spec.task == "package.module:Outer.Inner"


def test_missing_code_is_named(problems: Problems) -> None:
    sets = ("optimizer.name=no.py:A", "data.transforms=[{name: custom, function: gone.py:f}]")
    lines = problems(put(GOOD, "task.py:", "other.py:"), *sets)
    assert lines == [
        "train.yaml:3:1: task: there is no file other.py; its path is relative to the spec's folder",
        "--set data.transforms=[{name: custom, function: gone.py:f}]: data.transforms.0.function: "
        "there is no file gone.py; its path is relative to the spec's folder",
        "--set optimizer.name=no.py:A: optimizer.name: "
        "there is no file no.py; its path is relative to the spec's folder",
    ]


@pytest.mark.parametrize("task", ["task.py", "task.py:", ":X", "task.py:a b", "./task:X", "a-b:X", "task.py:X:3"])
def test_a_reference_of_the_wrong_form_is_an_error(problems: Problems, task: str) -> None:
    (line,) = problems(put(GOOD, "task.py:DigitsMLP", f"'{task}'"))
    assert line == f"train.yaml:3:1: task: expected file.py:Name or module:Name, got '{task}'"


def test_a_folder_is_no_task(problems: Problems, folder: Path) -> None:
    (folder / "spec/dir.py").mkdir()
    assert "there is no file dir.py" in problems(put(GOOD, "task.py:", "dir.py:"))[0]
    assert "there is no file" in problems(put(GOOD, "task.py:", f"{'x' * 300}.py:"))[0]


@pytest.mark.parametrize("key", ["storage", "data.train", "data.eval"])
@pytest.mark.parametrize(
    "url", ["s3://key:hunter2@bucket/x", "https://x/y?X-Amz-Signature=hunter2", "az://c?sig=hunter2"]
)
def test_a_secret_in_a_url_is_refused_and_not_shown(problems: Problems, key: str, url: str) -> None:
    lines = problems(GOOD, f"{key}={url}")
    assert len(lines) == 1
    assert lines[0].startswith(f"--set {key}=…: {key}: the URL holds credentials")
    assert "hunter2" not in lines[0]


@pytest.mark.parametrize(
    "change",
    [
        "task_args={api_key: hunter2}",
        "task_args={hub: {HF_TOKEN: hunter2}}",
        "task_args.note=AKIAABCDEFGHIJKLMNOP",
        "task_args.serve='serve --password hunter2'",
        "task_args.serve=[serve, --auth-token, hunter2]",
        "task_args.from='postgres://me:hunter2@db/x'",
    ],
)
def test_what_looks_like_a_secret_is_refused_and_not_shown(problems: Problems, change: str) -> None:
    (line,) = problems(GOOD, change)
    assert "looks like a secret; specs and jobs are stored, logged and shown" in line
    assert "hunter2" not in line
    assert "AKIA" not in line


def test_words_of_a_language_model_are_no_secrets() -> None:
    words = {"tokenizer": "bytes", "pad_token": "x", "token": "<pad>", "mask_token": "[MASK]", "max_tokens": "5"}
    paths = {"token_dir": "x", "auth_token_path": "y", "secret_name": "z", "run": "x.py --tokenizer bpe --max-tokens 9"}
    assert list(secrets_in({"task_args": words | paths, "arguments": ["--tokenizer", "bpe"]})) == []


def test_a_secret_is_refused_from_python_too(folder: Path) -> None:
    spec = train_spec({**SMALL, "task": "task.py:DigitsMLP", "task_args": {"wandb_api_key": "hunter2"}})
    with pytest.raises(SpecError, match=r"^task_args\.wandb_api_key: wandb_api_key looks like a secret"):
        resolve(spec, base=folder / "spec", cwd=folder)


@pytest.mark.parametrize("name", ["a/b", "../up", "a;rm", "a b", ".hidden", "-x", "$(id)", "a\nb", "", "x" * 129, "ü"])
def test_a_name_that_a_path_or_a_shell_would_take_apart_is_refused(problems: Problems, name: str) -> None:
    (line,) = problems(GOOD.replace("name: digits-mlp", f"name: {json.dumps(name)}"))
    assert "name" in line


def test_resolve_from_python(folder: Path) -> None:
    spec = train_spec({**SMALL, "task": "task.py:DigitsMLP"})
    assert spec.task == "task.py:DigitsMLP"
    resolved = resolve(spec, base=folder / "spec", cwd=folder / "work")
    assert resolved.task == f"{folder}/spec/task.py:DigitsMLP"
    assert resolved.storage == f"{folder}/work/runs"
    assert resolve(resolved, base=Path("/"), cwd=Path("/")) == resolved
    with pytest.raises(SpecError, match=r"^task: there is no file .*/work/task\.py"):
        resolve(spec, base=folder / "work", cwd=folder)


# --- overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("optimizer.lr=3e-4", 3e-4),
        ("eval.every_steps=7", 7),
        ("checkpoint.best=null", None),
        ("data.transforms.1.p=0.25", 0.25),
        ("task_args.a.b.c=[1, {x: y}]", [1, {"x": "y"}]),
        ("task_args.note=a=b", "a=b"),
        (" task_args . x = 3 ", 3),
    ],
)
def test_an_override_sets_a_key(read: Spec, text: str, value: object) -> None:
    here: Any = read(GOOD, text).model_dump()
    for key in text.partition("=")[0].replace(" ", "").split("."):
        here = here[int(key) if isinstance(here, list | tuple) else key]
    assert here == value


def test_an_override_replaces_a_mapping(read: Spec) -> None:
    spec = read(GOOD, "budget={steps: 5}", "task_args={}", "workers={max: 2}")
    assert (spec.budget.epochs, spec.budget.steps, spec.task_args) == (None, 5, {})
    assert (spec.workers.min, spec.workers.max) == (1, 2)


def test_the_last_of_two_overrides_wins(read: Spec) -> None:
    assert read(GOOD, "optimizer.lr=1", "optimizer.lr=2").optimizer.lr == 2
    assert read(GOOD, "task_args.hidden=1", "task_args={x: 1}").task_args == {"x": 1}


def test_epochs_and_steps_push_each_other_out(read: Spec, problems: Problems) -> None:
    assert read(GOOD, "budget.steps=3").budget.model_dump() == {"epochs": None, "steps": 3}
    steps = put(GOOD, "{epochs: 10}", "{steps: 7}")
    assert read(steps, "budget.epochs=3").budget.model_dump() == {"epochs": 3, "steps": None}
    assert read(GOOD, "budget.steps=null").budget.epochs == 10
    assert read(GOOD, "budget.epochs=null", "budget.steps=3").budget.steps == 3
    assert read(GOOD, "budget={steps: 3}", "budget={epochs: 4}").budget.epochs == 4
    both = "--set budget.epochs=4: budget: give exactly one of epochs and steps"
    assert problems(GOOD, "budget.epochs=4", "budget.steps=3") == [both]
    assert problems(GOOD, "budget={epochs: 4}", "budget.steps=3") == [both.replace(".epochs=4", "={epochs: 4}")]


def test_overrides_mend_what_is_wrong_in_the_file(read: Spec) -> None:
    assert read(put(GOOD, "lr: 1.0e-3", "lr: -1"), "optimizer.lr=1").optimizer.lr == 1
    assert read(put(GOOD, "budget: {epochs: 10}", "budget:"), "budget.steps=1").budget.steps == 1


def test_the_source_of_an_override_is_left_alone() -> None:
    source = parse(GOOD, name="x")
    before = (dict(source.data["optimizer"]), dict(source.lines))
    override(source, ["optimizer.lr=5", "optimizer.x=1"])
    assert (source.data["optimizer"], source.lines, source.sets) == (*before, {})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=-1", "optimizer.lr: expected a number greater than 0, got -1"),
        ("optimizer.lrr=1", "optimizer: unknown key 'lrr'; did you mean 'lr'?"),
        ("budget={epochs: 0}", "budget.epochs: expected a number greater than 0, got 0"),
        ("budget={}", "budget: give exactly one of epochs and steps"),
        ("optimizer={name: sgd}", "optimizer: missing key 'lr' (learning rate, before the schedule's factor)"),
        ("workers.max=9", "data.slots 8 is less than workers.max 9: a worker needs a slot"),
        ("workers.min=5", "workers: min 5 is more than max 4"),
        ("workers.gpus=0.5", "workers: gpus 0.5: workers cannot share a GPU (NCCL refuses it); give each 1"),
        ("storage=", "storage: expected text, got nothing"),
        ("optimizer.lr.x=1", "optimizer.lr is 0.001: optimizer.lr.x cannot be set in it"),
        (
            "data.transforms.2.p=1",
            "data.transforms has 2 items, counted from 0: data.transforms.2.p cannot be set in it",
        ),
        ("=1", "expected a.b=value, such as --set optimizer.lr=0.01"),
        ("optimizer", "expected a.b=value, such as --set optimizer.lr=0.01"),
        ("a..b=1", "expected a.b=value, such as --set optimizer.lr=0.01"),
        ("name=a: b: c", "not YAML: mapping values are not allowed here; put quotes around text that holds ': '"),
        ("task_args=!x 3", "the tag !x cannot stand in a spec; write a plain value"),
    ],
)
def test_a_wrong_override_names_itself_and_no_line(problems: Problems, text: str, expected: str) -> None:
    assert problems(GOOD, text) == [f"--set {text}: {expected}"]


def test_an_error_beside_an_override_keeps_its_line(problems: Problems) -> None:
    lines = problems(put(GOOD, "lr: 1.0e-3", "lr: -1"), "optimizer.eps=-2", "data.slots=9")
    assert lines == [
        "train.yaml:16:3: optimizer.lr: expected a number greater than 0, got -1",
        "--set optimizer.eps=-2: optimizer.eps: expected a number greater than 0, got -2",
    ]


# --- problems in the file, each with its line


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("1.0e-3", "-1", "16:3: optimizer.lr: expected a number greater than 0, got -1"),
        ("1.0e-3", "fast", "16:3: optimizer.lr: expected a number, got 'fast'"),
        ("1.0e-3", ".inf", "16:3: optimizer.lr: expected a finite number, got inf"),
        ("1.0e-3", ".nan", "16:3: optimizer.lr: expected a finite number, got nan"),
        ("1.0e-3", "true", "16:3: optimizer.lr: expected a number, got true"),
        ("1.0e-3", "", "16:3: optimizer.lr: expected a number, got nothing"),
        ("1.0e-3", "[1]", "16:3: optimizer.lr: expected a number, got a list of 1"),
        ("0.95]", "1]", "17:16: optimizer.betas.1: expected a number less than 1, got 1"),
        ("0.95]", "]", "17:3: optimizer.betas: value 2 is missing"),
        ("0.95]", "0, 0]", "17:3: optimizer.betas: expected at most 2 values, got a list of 3"),
        ("epochs: 10", "epochs: 1.5", "19:10: budget.epochs: expected a whole number, got 1.5"),
        ("epochs: 10", "epochs: 1, steps: 2", "19:10: budget: give exactly one of epochs and steps"),
        ("{epochs: 10}", "10", "19:1: budget: expected a mapping, got 10"),
        ("{epochs: 10}", "{}", "19:1: budget: give exactly one of epochs and steps"),
        ("min: 1", "min: 5", "20:11: workers: min 5 is more than max 4"),
        ("slots: 8", "slots: 3", "9:3: data.slots 3 is less than workers.max 4: a worker needs a slot"),
        ("batch: 64", "batch: -3", "8:3: data.global_batch: expected a number greater than 0 or 'all', got -3"),
        ("batch: 64", "batch: al",
         "8:3: data.global_batch: expected a whole number or 'all', got 'al'; did you mean 'all'?"),
        ("name: adamw", "name: full_batch", "8:3: optimizer full_batch needs data.global_batch: all"),
        ("digits-mlp", "123", "2:1: name: expected text, got 123; put quotes around it: '123'"),
        ("name: cosine", "name: cosin", "18:12: schedule.name: expected 'constant', 'linear', 'cosine', 'wsd', "
         "'inverse_sqrt' or 'one_cycle', got 'cosin'; did you mean 'cosine'?"),
        ("name: flip", "name: flop", "12:7: data.transforms.1.name: expected one of scale, standardise, flip, shift, "
         "custom, got 'flop'; did you mean 'flip'?"),
        ("- name: flip", "- p: 1", "12:7: data.transforms.1: missing key 'name'"),
        ("- name: flip", "- 7\n    - name: flip", "12:7: data.transforms.1: expected a mapping, got 7"),
        ("      column: image\n", "",
         "12:7: data.transforms.1: missing key 'column' (the column that holds the images)"),
        ("      column: image", "      colum: image",
         "13:7: data.transforms.1: unknown key 'colum'; did you mean 'column'?"),
        ("scale, column: image", "scale, column: image, p: 1",
         "11:36: data.transforms.0: unknown key 'p'; known keys: name, column, factor, offset"),
        ("  lr: 1.0e-3\n", "", "14:1: optimizer: missing key 'lr' (learning rate, before the schedule's factor)"),
        ("budget: {epochs: 10}\n", "", "1:1: missing key 'budget' (how long: epochs or steps)"),
        ("budget:", "bugdet:", "19:1: unknown key 'bugdet'; did you mean 'budget'?"),
        ("storage: runs", "momentun: 1", "21:1: unknown key 'momentun'; known keys: kind, name, task"),
        ("  lr:", "  momentun: 0.5\n  lr:", "16:3: optimizer: unknown key 'momentun'; did you mean 'momentum'?"),
        ("  lr:", "  LR:", "16:3: optimizer: unknown key 'LR'; did you mean 'lr'?"),
        ("name: adamw", "name: adamW", "15:3: optimizer: optimizer 'adamW' is none of sgd, momentum, nesterov, "
         "full_batch, adam, adamw, nadam, radam, adagrad, rmsprop, adafactor, lion, muon, shampoo, soap, "
         "schedule_free_sgd, schedule_free_adamw and not module:Class; did you mean 'adamw'?"),
        ("{hidden: 128}", "{1: 2}", "4:13: task_args.1: expected text, got 1; put quotes around it: '1'"),
        ("digits-mlp", "-x", "2:1: name: expected up to 128 letters, digits, dots, dashes and underscores; "),
        ("storage: runs", "optimizer: {}", "21:1: optimizer: this key stands twice, first in line 14; remove one"),
        ("min: 1", "max: 1", "20:19: workers.max: this key stands twice, first in line 20; remove one"),
        ("{hidden: 128}", "{[a]: 1}", "4:13: task_args: expected text as a key, got a list of 1"),
        ("{hidden: 128}", "{~: 1}", "4:13: task_args: expected text as a key, got nothing"),
        ("{hidden: 128}", "{a: !!int x}", "4:16: task_args.a: 'x' cannot be read as int; put quotes around text"),
        ("{hidden: 128}", '{a: "\\ud800"}', "4:16: task_args.a: '\\ud800' cannot be read as str"),
        ("{hidden: 128}", '{a: !!bool x}', "4:16: task_args.a: 'x' cannot be read as bool"),
        ("{hidden: 128}", "{a: !!set {x}}", "4:16: task_args.a: the tag !!set cannot stand in a spec; write a plain"),
        ("{hidden: 128}", "{<<: 3}", "4:17: task_args: '<<' takes a mapping, such as *name"),
        ("{hidden: 128}", "&a {a: *a}", "4:12: task_args.a.a: nested too deep or too large for a spec; an alias"),
        ("kind: train", "kind: sweep", "1:1: kind: this is a sweep spec, and a train spec is wanted; run "
         "it with `elastrain sweep`"),
        ("kind: train", "kind: job", "1:1: kind: this is a job spec, and a train spec is wanted; this version "
         "runs no such kind"),
        ("kind: train", "kind: trian", "1:1: kind: expected 'train', got 'trian'; did you mean 'train'?"),
        ("kind: train", "kind: [x]", "1:1: kind: expected 'train', got a list of 1"),
    ],
)  # fmt: skip
def test_a_problem_has_its_line_and_its_sentence(problems: Problems, old: str, new: str, expected: str) -> None:
    lines = problems(put(GOOD, old, new))
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"train.yaml:{expected}")


def test_every_problem_is_told_at_once(problems: Problems) -> None:
    lines = problems(
        "name: x\ntask: a:B\ndata: {train: d, seed: -1}\noptimizer: {name: sgd, lr: 0, foo: 1}\nbugdet: 1\n"
    )
    assert [re.sub(r" \(.*\)", "", line) for line in lines] == [
        "train.yaml:3:1: data: missing key 'global_batch'",
        "train.yaml:3:18: data.seed: expected a number of at least 0, got -1",
        "train.yaml:4:24: optimizer.lr: expected a number greater than 0, got 0",
        "train.yaml:4:31: optimizer: unknown key 'foo'; known keys: "
        "name, lr, weight_decay, no_decay, momentum, betas, eps, args, phases",
        "train.yaml:5:1: unknown key 'bugdet'; did you mean 'budget'?",
    ]


def test_phases_are_checked_like_an_optimizer(problems: Problems, read: Spec) -> None:
    phases = "optimizer:\n  phases:\n    critic: {lrr: 1, lr: -1}\n    other: {phases: {}}\n"
    assert problems(put(GOOD, "optimizer:\n", phases)) == [
        "train.yaml:16:22: optimizer.phases.critic.lr: expected a number greater than 0, got -1",
        "train.yaml:16:14: optimizer.phases.critic: unknown key 'lrr'; did you mean 'lr'?",
        "train.yaml:17:13: optimizer.phases.other.phases: a phase has no phases of its own; remove the key",
    ]
    assert read(GOOD, "optimizer.phases.critic.lr=0.5").optimizer.phases == {"critic": {"lr": 0.5}}


def test_what_is_merged_in_does_not_move_the_lines_of_what_is_written(problems: Problems) -> None:
    text = put(GOOD, "task_args: {hidden: 128}\n", "task_args: {a: &a {lr: 1, eps: -3}}\n")
    assert problems(put(text, "  lr: 1.0e-3\n", "  lr: -1\n  <<: *a\n")) == [
        "train.yaml:16:3: optimizer.lr: expected a number greater than 0, got -1",
        "train.yaml:4:27: optimizer.eps: expected a number greater than 0, got -3",
    ]


# --- what is no spec at all


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "train.yaml: the file is empty; a train spec has name, task, data, optimizer and budget"),
        (b"# nothing\n", "train.yaml: the file is empty"),
        (b"- a\n", "train.yaml:1:1: expected a mapping with keys such as name, task and data, got a list of 1"),
        (b"\n3\n", "train.yaml:2:1: expected a mapping with keys such as name, task and data, got 3"),
        (b"\xff\xfe\x00", "train.yaml: byte 0 is not UTF-8 text; give a YAML file such as train.yaml"),
        (b"PAR1\x15\x04\x00\x00", "train.yaml: not a text file"),
        (b"a: [1\n", "train.yaml:2:1: not YAML: while parsing a flow sequence from line 1: expected ',' or ']'"),
        (b"a: 'x\n", "train.yaml:2:1: not YAML: while scanning a quoted scalar from line 1: found unexpected end"),
        (b"a:\n\tb: 1\n", "train.yaml:2:1: not YAML: "),
        (b"a: b: c\n", "train.yaml:1:5: not YAML: mapping values are not allowed here; put quotes"),
        (b"a: 1\n---\nb: 1\n", "train.yaml:2:1: not YAML: expected a single document in the stream from line 1"),
        (b"a: *x\n", "train.yaml:1:4: not YAML: found undefined alias 'x'"),
        (b"[" * 3000, "train.yaml:1:41: not YAML: maximum depth of data structure exceeded (41); no spec is nested"),
        (b"a: " + b"9" * 5000, "train.yaml:1:4: a: '999"),
        (b'a: "\\UFFFFFFFF"\n', "train.yaml: not YAML: "),
        (b"a: !<%ff> x\n", "train.yaml:1:6: not YAML: while scanning"),
        (b"x" * 2_000_000, "train.yaml: larger than 1 MiB, so no spec"),
        (
            b"a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
            b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\n",
            "train.yaml:1:",
        ),
    ],
)
def test_what_is_no_spec_is_one_sentence(problems: Problems, content: bytes, expected: str) -> None:
    (line,) = problems(content)
    assert line.startswith(expected)
    assert len(line) < 200


def test_an_anchor_may_be_used_again(read: Spec) -> None:
    assert read(put(GOOD, "{hidden: 128}", "{a: &x 1, b: &x 2, c: *x}")).task_args["c"] == 2


def test_a_missing_file_lists_the_specs_beside_it(folder: Path) -> None:
    (folder / "spec/train.yaml").write_text(GOOD)
    with pytest.raises(SpecError, match=r"trian\.yaml: no such file; .* \(there: train\.yaml\)$"):
        read_train(folder / "spec/trian.yaml")
    with pytest.raises(SpecError, match=r"spec: this is a folder; give the spec in it \(there: train\.yaml\)$"):
        read_train(folder / "spec")
    for path in ("gone/x.yaml", "x" * 300, "a\0b", "s3://bucket/train.yaml"):
        with pytest.raises(SpecError, match=r"no such file|cannot be read"):
            read_train(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_says_so(folder: Path) -> None:
    path = folder / "spec/train.yaml"
    path.write_text(GOOD)
    path.chmod(0)
    with pytest.raises(SpecError, match="cannot be read: Permission denied"):
        read_train(path)


def test_a_working_folder_that_is_gone_says_so(folder: Path) -> None:
    (folder / "spec/train.yaml").write_text(GOOD)
    (folder / "work").rmdir()
    with pytest.raises(SpecError, match="the working folder is gone"):
        read_train(folder / "spec/train.yaml")


def test_a_loop_of_links_says_so(folder: Path) -> None:
    path = folder / "spec/train.yaml"
    path.symlink_to(path)
    with pytest.raises(SpecError, match="cannot be read"):
        read_train(path)


yamlish = st.text(st.sampled_from("ab:{}[]-,&*!|>%@'\"\\#?~=<.0123e \n\t\r\x00\x85\ufeff\u2028é"), max_size=40)


@settings(max_examples=400, deadline=None)
@given(text=yamlish | st.text(max_size=20))
@example(text="!!timestamp x")
@example(text="%YAML 1.1\n---\na: yes")
@example(text="a: !!float 1e999999\nb: !!bool x\nc: !!null y")
@example(text="? |\n")
def test_no_text_is_a_traceback(text: str) -> None:
    for act in (lambda: parse_train(text), lambda: override(parse(GOOD, name="x"), [text, f"a={text}", f"{text}=1"])):
        with contextlib.suppress(SpecError):
            act()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=30))
def test_no_bytes_are_a_traceback(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(SpecError):
        read_train(tmp_path / "x")


# --- unknown keys


def models(kind: type[Model] = TrainSpec) -> Mapping[tuple[str, ...], type[Model]]:
    """Return the models inside TrainSpec by the path of keys that leads to them."""
    found: dict[tuple[str, ...], type[Model]] = {(): kind}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Model):
            found |= {(name, *path): model for path, model in models(field.annotation).items()}
    return found


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_every_misspelt_key_gets_a_suggestion(data: st.DataObject) -> None:
    path, model = data.draw(st.sampled_from(sorted(models().items(), key=str)))
    key = data.draw(st.sampled_from([name for name in model.model_fields if len(name) > 2]))
    place = data.draw(st.integers(0, len(key) - 1))
    typo = data.draw(
        st.sampled_from([key[:place] + key[place + 1 :], key[:place] + "x" + key[place:], key.upper() + "s"])
    )
    spec = train_spec(SMALL).model_dump()
    here = spec
    for each in path:
        here = here[each]
    if typo in here:
        return
    here[typo] = 1
    with pytest.raises(SpecError) as caught:
        train_spec(spec)
    prefix = "".join(f"{'.'.join(path)}: " for _ in path[:1])
    assert str(caught.value).startswith(f"{prefix}unknown key {typo!r}; did you mean '")
    assert str(caught.value).split("'")[3] in model.model_fields


@settings(max_examples=50, deadline=None)
@given(key=st.text().filter(lambda key: key not in TrainSpec.model_fields))
def test_every_unknown_key_gets_a_suggestion_or_the_list(key: str) -> None:
    with pytest.raises(SpecError, match=r"did you mean|known keys: kind, name"):
        train_spec({**SMALL, key: 1})


# --- from Python


def test_a_mapping_from_python_has_the_same_sentences_without_lines() -> None:
    with pytest.raises(SpecError) as caught:
        train_spec({**SMALL, "optimizer": {"name": "sgd", "lr": -1, "momentun": 1}})
    assert str(caught.value).splitlines() == [
        "optimizer.lr: expected a number greater than 0, got -1",
        "optimizer: unknown key 'momentun'; did you mean 'momentum'?",
    ]
    with pytest.raises(SpecError, match=r"^kind: this is a sweep spec"):
        train_spec({"kind": "sweep"})
    with pytest.raises(SpecError, match=r"^a train spec is a mapping"):
        train_spec([1])  # type: ignore[arg-type]


def test_python_values_become_plain_ones() -> None:
    import numpy as np

    spec = train_spec(
        {
            **SMALL,
            "task_args": {"dims": (1, np.int64(2)), "rate": np.float32(0.5), "path": Path("a/b")},
            "data": DataSpec(train="data", global_batch=8),
            "optimizer": {"name": "sgd", "lr": np.float64(0.5)},
        }
    )
    assert spec.task_args == {"dims": [1, 2], "rate": 0.5, "path": "a/b"}
    assert parse_train(dump(spec)) == spec


@pytest.mark.parametrize("value", [{1, 2}, object(), print, b"x", 1j])
def test_an_object_is_no_plain_value(value: object) -> None:
    with pytest.raises(SpecError, match=r"^task_args\.a\.0: expected text, a number, .* got a Python "):
        train_spec({**SMALL, "task_args": {"a": [value]}})


@pytest.mark.parametrize("key", [None, True, 1.5, (1, 2), b"x"])
def test_a_key_is_text_or_a_whole_number(key: object) -> None:
    with pytest.raises(SpecError, match=r"^task_args\.a: expected text as a key, got "):
        train_spec({**SMALL, "task_args": {"a": {key: 1}}})


def test_enumerations_are_their_values() -> None:
    class Mode(str, enum.Enum):  # noqa: UP042 -- what users have
        FAST = "fast"

    spec = train_spec({**SMALL, "task_args": {Mode.FAST: Mode.FAST}})
    assert dump(spec).count("  fast: fast\n") == 1


def test_data_that_hold_themselves_are_refused() -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    with pytest.raises(SpecError, match="nested more than 40 deep"):
        train_spec({**SMALL, "task_args": loop})


def test_models_say_the_same_when_made_in_python() -> None:
    with pytest.raises(ValueError, match="min 3 is more than max 1"):
        WorkersSpec(min=3)
    with pytest.raises(ValueError, match="did you mean 'nesterov'"):
        OptimizerSpec(name="nestrov", lr=1)


# --- dump and read


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
args = st.dictionaries(st.text(max_size=8), plain, max_size=3)
share = st.floats(0, 1, exclude_max=True)
positive = st.floats(0, 1e300, exclude_min=True)
count = st.integers(1, 10**12)
transforms = st.one_of(
    st.fixed_dictionaries({"name": st.just("scale"), "column": st.text()}, optional={"factor": st.floats(-9, 9)}),
    st.fixed_dictionaries({"name": st.just("flip"), "column": st.text(), "p": share}),
    st.fixed_dictionaries({"name": st.just("shift"), "column": st.text(), "pixels": count}),
    st.fixed_dictionaries({"name": st.just("custom"), "function": st.text(), "train_only": st.booleans()}),
)
optimizers = {"name": st.sampled_from(["sgd", "adam", "x.y:Z"]), "lr": positive}
trains = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
        "task": st.text(),
        "data": st.fixed_dictionaries(
            {"train": st.text(), "global_batch": count | st.just("all")},
            optional={
                "slots": st.integers(4, 99),
                "columns": st.lists(st.text()),
                "transforms": st.lists(transforms),
            },
        ),
        "optimizer": st.fixed_dictionaries(optimizers, optional={"args": args, "betas": st.tuples(share, share)}),
        "budget": st.fixed_dictionaries({"steps": count}) | st.fixed_dictionaries({"epochs": count}),
    },
    optional={
        "task_args": args,
        "clip_norm": st.none() | positive,
        "compile": st.booleans(),
        "checkpoint": st.fixed_dictionaries({"best": st.none() | st.text()}),
        "workers": st.fixed_dictionaries({"max": st.integers(1, 4), "cpus": positive}),
        "precision": st.sampled_from(["fp32", "bf16"]),
        "storage": st.text(),
    },
)


@settings(max_examples=150, deadline=None)
@given(data=trains)
def test_dump_and_read_give_the_same_spec(data: dict[str, Any]) -> None:
    spec = train_spec(data)
    again = parse_train(dump(spec))
    assert again == spec
    assert dump(again) == dump(spec)
    assert changed(spec, again) == []


def test_a_dumped_file_is_read_back(read: Spec, folder: Path) -> None:
    spec = read(GOOD, "checkpoint.best=null", "task_args.text='a: #b\n  c  '")
    (folder / "spec.yaml").write_text(dump(spec))
    assert read_train(folder / "spec.yaml") == spec
    assert "best: null" in dump(spec)


def test_a_stored_spec_is_read_where_its_task_is_not(read: Spec, folder: Path) -> None:
    spec = read(GOOD)
    (folder / "spec/task.py").unlink()
    assert parse_train(dump(spec)) == spec
    with pytest.raises(SpecError, match=r"^run/spec\.yaml:1:1: missing key 'task'"):
        parse_train("name: x", name="run/spec.yaml")


def test_dump_refuses_objects() -> None:
    spec = TrainSpec.model_validate({**SMALL, "task_args": {"f": print}})
    with pytest.raises(SpecError, match=r"^task_args\.f: expected text"):
        dump(spec)


# --- schema


def test_every_key_of_the_schema_is_described() -> None:
    root = schema()
    json.dumps(root)
    assert len(root["$defs"]) == 35
    for model in root["$defs"].values():
        assert model["additionalProperties"] is False
        for key, value in model["properties"].items():
            assert value["title"], key
            assert value["description"], (model["title"], key)
    assert {"name", "task", "data", "optimizer", "budget"} == set(root["$defs"]["TrainSpec"]["required"])
    assert {"name", "base", "objective", "budget"} == set(root["$defs"]["SweepSpec"]["required"])
    assert [each["$ref"] for each in root["anyOf"]] == [f"#/$defs/{kind}Spec" for kind in ("Train", "Sweep", "Cluster")]


# --- what changed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer.lr=0.002", ["optimizer.lr: 0.001 -> 0.002"]),
        ("optimizer.betas=[0.9, 0.99]", ["optimizer.betas.1: 0.95 -> 0.99"]),
        ("task_args={hidden: 1, x: true}", ["task_args.hidden: 128 -> 1", "task_args.x: unset -> true"]),
        ("clip_norm=1", ["clip_norm: unset -> 1.0"]),
        ("data.transforms.1.p=0.1", ["data.transforms.1.p: 0.5 -> 0.1"]),
        ("data.slots=9", ["data.slots: 8 -> 9"]),
        ("data.global_batch=32", ["data.global_batch: 64 -> 32"]),
        ("data.seed=1", ["data.seed: 0 -> 1"]),
        ("precision=bf16", ["precision: fp32 -> bf16"]),
        ("consistency=bitwise", ["consistency: sample -> bitwise"]),
        ("schedule.name=linear", ["schedule.name: cosine -> linear"]),
        ("micro_batch=2", ["micro_batch: unset -> 2"]),
        ("optimizer.phases.g.lr=2", ["optimizer.phases.g: unset -> {'lr': 2}"]),
        ("task=task.py:Other", ["task: task.py:DigitsMLP -> task.py:Other"]),
        ("task=x.y:DigitsMLP", ["task: task.py:DigitsMLP -> x.y:DigitsMLP"]),
        ("name=other", []),
        ("storage=s3://elsewhere", []),
        ("workers={max: 2}", []),
        ("budget.steps=99", []),
        ("eval.every_steps=3", []),
        ("checkpoint.keep=9", []),
        ("audit=true", []),
        ("data.eval=null", []),
        ("data.train=elsewhere", []),
        ("data.slots=null", []),
        ("optimizer.lr=1e-3", []),
    ],
)
def test_what_decides_the_result_is_told(read: Spec, text: str, expected: list[str]) -> None:
    assert changed(read(GOOD), read(GOOD, text)) == expected


def test_every_key_of_the_spec_is_free_or_told(read: Spec) -> None:
    """A key added to the spec decides the result until somebody says that it does not."""
    free = {"kind", "name", "storage", "workers", "budget", "eval", "checkpoint", "audit", "data"}
    other: dict[str, Any] = {"task": "x:Y", "task_args": {}, "optimizer": {"name": "sgd", "lr": 1}, "schedule": {}}
    other |= {"clip_norm": 1, "l1": 1, "ema": 0.5, "compile": True, "micro_batch": 1}
    other |= {"precision": "bf16", "consistency": "bitwise"}
    assert other.keys() == TrainSpec.model_fields.keys() - free
    spec = read(GOOD)
    for key, value in other.items():
        assert changed(spec, train_spec({**spec.model_dump(), key: value})), key


def test_code_that_moved_is_the_same_code(read: Spec) -> None:
    one = read(GOOD, "optimizer.name=task.py:Lion", "data.transforms=[{name: custom, function: task.py:f}]")
    data = json.loads(one.model_dump_json().replace("/spec/task.py", "/moved/task.py"))
    assert changed(one, train_spec(data)) == []
    renamed = json.loads(one.model_dump_json().replace("task.py:Lion", "task.py:Tiger"))
    assert changed(one, train_spec(renamed)) == ["optimizer.name: task.py:Lion -> task.py:Tiger"]


def test_slots_that_were_not_set_are_as_many_as_workers() -> None:
    old = train_spec({**SMALL, "workers": {"max": 4}})
    same = train_spec({**SMALL, "data": {**SMALL["data"], "slots": 4}})
    other = train_spec({**SMALL, "data": {**SMALL["data"], "slots": 5}})
    assert changed(old, same) == []
    assert changed(old, other) == ["data.slots: 4 -> 5"]


# --- other specs, and the cost of an import


def test_problems_and_source_serve_any_model(tmp_path: Path) -> None:
    class Node(Model):
        """A node of some cluster."""

        cpus: int
        labels: dict[str, list[int]]

    class Cluster(Model):
        """Some cluster."""

        nodes: list[Node]
        head: Node | str = "x"

    path = tmp_path / "cluster.yaml"
    path.write_text("nodes:\n  - {cpus: 1, labels: {a: [1, x]}}\n  - {cpu: 2, labels: {}}\nhead: 3\n")
    source = load(path)
    with pytest.raises(SpecError) as caught:
        validate(Cluster, source.data, source.where)
    assert str(caught.value).replace(f"{path}:", "").splitlines() == [
        "2:31: nodes.0.labels.a.1: expected a whole number, got 'x'",
        "3:6: nodes.1: unknown key 'cpu'; did you mean 'cpus'?",
        "4:1: head: expected a mapping or text, got 3; put quotes around it: '3'",
    ]
    assert issubclass(SpecError, ElastrainError)


def test_reading_a_spec_imports_neither_torch_nor_ray_and_is_quick() -> None:
    script = textwrap.dedent("""
        import sys
        import elastrain.spec.document
        print({"torch", "ray", "numpy", "pyarrow"} & sys.modules.keys())
    """)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.strip() == "set()"
    # Of the processor, so that a busy machine changes little: 0.13 s. A torch or ray import costs more than a second.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


# --- the cache


@pytest.mark.parametrize(
    ("written", "found"),
    [("4096", 4096), ("100GB", 100 * 10**9), ("1.5 GiB", 3 << 29), ("20 MB", 20 * 10**6), ("7B", 7), ("2TiB", 2 << 40)],
)
def test_bytes_of_the_cache_are_a_number_or_have_a_unit(read: Spec, written: str, found: int) -> None:
    spec = read(GOOD, f"data.cache={{folder: /nvme, max_bytes: {written}}}")
    assert spec.data.cache is not None
    assert spec.data.cache.max_bytes == found
    assert train_spec(parse_train(dump(spec), name="again").model_dump()) == spec


@pytest.mark.parametrize("written", ["0", "-1", "true", "100 parsecs", "GB", "1e400GB", "9" * 400 + "GB"])
def test_bytes_that_are_none_are_refused(problems: Problems, written: str) -> None:
    (line,) = problems(GOOD, f"data.cache={{folder: /nvme, max_bytes: {written}}}")
    assert "data.cache.max_bytes: expected a" in line


def test_the_cache_is_a_folder_of_each_node_and_changes_no_run(read: Spec, problems: Problems, folder: Path) -> None:
    spec = read(GOOD, "data.cache={folder: cache, max_bytes: 1GB}")
    found = resolve(spec, base=folder / "spec", cwd=folder / "work")
    assert found.data.cache is not None
    assert found.data.cache.folder == str(folder / "work/cache")
    assert not changed(spec, read(GOOD))
    (line,) = problems(GOOD, "data.cache={folder: s3://bucket/cache, max_bytes: 1GB}")
    assert "is a URL; the cache is a folder on each node's own disk" in line
