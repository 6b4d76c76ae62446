"""A sweep's spec is the sweep that was meant, or one error with a line for each problem."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.sweeps.texts import FAIR, SEARCH

from elastrain.errors import SpecError
from elastrain.spec.document import dump, read_train
from elastrain.spec.sweep import SweepSpec
from elastrain.sweeps.document import base_of, parse_sweep, read_sweep, resolve_sweep, sweep_spec
from elastrain.sweeps.space import arms_of

Read = Callable[..., SweepSpec]


def problems(read: Read, text: str, *sets: str) -> list[str]:
    with pytest.raises(SpecError) as caught:
        read(text, *sets)
    return [re.sub(r"^\S*/sweep.yaml:(\d+):\d+", r"\1", line) for line in str(caught.value).splitlines()]


def put(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def test_a_sweep_round_trips_through_yaml(read: Read) -> None:
    for text in (SEARCH, FAIR):
        spec = read(text)
        assert parse_sweep(dump(spec)) == spec
        assert sweep_spec(spec.model_dump()) == spec
        assert sweep_spec(json.loads(json.dumps(spec.model_dump()))) == spec


def test_paths_are_relative_to_the_file_or_the_working_folder(
    read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.py").write_text("class Own: ...\n")
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    text = put(SEARCH, "[adamw, momentum, sgd]", "[adamw, momentum, 'own.py:Own']")
    spec = read(put(text, "set: {", "set: {data.train: other, data: {cache: {folder: kept, max_bytes: 1GB}}, "))
    assert spec.base == str(tmp_path / "train.yaml")
    assert spec.storage == str(cwd / "runs")
    assert spec.set["data.train"] == str(cwd / "other")
    assert spec.set["data"]["cache"]["folder"] == str(cwd / "kept")
    assert spec.space["optimizer.name"]["choice"][2] == f"{tmp_path}/own.py:Own"
    assert resolve_sweep(spec, base=Path("/nowhere")) == spec
    assert read_sweep(Path("..") / "sweep.yaml") == spec


def test_a_base_may_be_anywhere_and_arms_may_be_files(read: Read, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("class Own: ...\n")
    text = put(FAIR, "base: train.yaml", f"base: {tmp_path}/train.yaml")
    spec = read(put(text, "optimizer: {name: sgd}", "optimizer: {name: 'own.py:Own', lr: {log: [0.1, 1]}}"))
    assert spec.arms[0].optimizer["name"] == f"{tmp_path}/own.py:Own"
    assert "there is no file" in problems(read, text, "arms.0.optimizer.name=lost.py:Own")[0]


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("space.optimizer.lr={log: [0.1, 1]}", "optimizer.lr", 0.1),
        ("space.data={global_batch: {choice: [8, 16]}}", "data.global_batch", 8),
        ("space.task_args.hidden={choice: [1, 2]}", "task_args.hidden", 1),
    ],
)
def test_an_override_takes_the_place_of_the_dotted_key(read: Read, override: str, path: str, value: float) -> None:
    spec = read(SEARCH, override)
    (arm,) = arms_of(spec, base_of(spec))
    assert arm.dimensions[path].values[0] == value


def test_a_fixed_value_in_a_space_is_set_in_all_trials(read: Read) -> None:
    spec = read(SEARCH, "space.clip_norm=2.0", "space.schedule={final: 0.5}", "search.seed=3")
    (arm,) = arms_of(spec, base_of(spec))
    assert arm.base.clip_norm == 2.0
    assert (arm.base.schedule.name, arm.base.schedule.warmup_steps, arm.base.schedule.final) == ("cosine", 20, 0.5)
    assert "clip_norm" not in arm.dimensions
    assert spec.search.seed == 3


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("optimizer.lr:", "optimizer.lrr:", "8: optimizer: unknown key 'lrr'; did you mean 'lr'?"),
        ("optimizer.lr: {", "clip.norm: {", "8: unknown key 'clip'; did you mean 'clip_norm'?"),
        ("{log: [1.0e-4, 1.0e-1]}", "{log: [0.1, 0.1]}",
         "8: space.optimizer.lr: log [0.1, 0.1] is an empty range: the first number must be smaller than the second"),
        ("{log: [1.0e-4, 1.0e-1]}", "{log: [1, 0.1]}",
         "8: space.optimizer.lr: log [1, 0.1] is an empty range: the first number must be smaller than the second"),
        ("{log: [1.0e-4, 1.0e-1]}", "{log: [0, 0.1]}",
         "8: space.optimizer.lr.log.0: expected a number greater than 0, got 0"),
        ("{log: [1.0e-4, 1.0e-1]}", "{log: [0.1]}", "8: space.optimizer.lr.log: value 2 is missing"),
        ("{log: [1.0e-4, 1.0e-1]}", "{lgo: [1, 0.1]}", "8: space.optimizer.lr.lgo: optimizer.lr is 0.003: "
         "optimizer.lr.lgo cannot be set in it; how it varies is one of uniform, log, int, int_log, one_minus_log, "
         "normal, choice, grid; did you mean 'log'?"),
        ("{log: [1.0e-4, 1.0e-1]}", "{log: [0.1, 1], uniform: [0.1, 1]}", "8: space.optimizer.lr: give exactly one of "
         "uniform, log, int, int_log, one_minus_log, normal, choice, grid, got uniform, log"),
        ("{log: [1.0e-4, 1.0e-1]}", "{log: [0.1, 1], whn: {}}",
         "8: space.optimizer.lr: unknown key 'whn'; did you mean 'when'?"),
        ("{log: [1.0e-4, 1.0e-1]}", "{uniform: [-1, 1]}",
         "8: optimizer.lr: expected a number greater than 0, got -1.0"),
        ("{choice: [64, 256]}", "{choice: [64, -3]}",
         "9: data.global_batch: expected a number greater than 0 or 'all', got -3"),
        ("{choice: [64, 256]}", "{choice: []}", "9: space.data.global_batch: choice lists no value"),
        ("{choice: [64, 256]}", "{choice: [64, 64]}", "9: space.data.global_batch: choice lists a value twice; each "
         "is as likely as every other"),
        ("{choice: [64, 256]}", "{grid: [64, 256]}", "9: space.data.global_batch: each value of a grid is tried by "
         "search.method grid only; write choice for quasirandom"),
        ("adamw, momentum, sgd]", "adamw, momentum, sdg]", "10: optimizer: optimizer 'sdg' is none of"),
        ("[5.0e-3, 0.3]", "[5.0e-3, 1.5]", "11: optimizer.momentum: expected a number of at least 0, got -0.5"),
        ("{optimizer.name: momentum}", "{optimizer.nam: momentum}", "11: space.optimizer.momentum.when."
         "optimizer.nam: unknown field 'optimizer.nam'; did you mean 'optimizer.name'?"),
        ("{optimizer.name: momentum}", "{optimizer.name: adam}", "11: space.optimizer.momentum.when."
         "optimizer.name: optimizer.name is never adam: its values are adamw, momentum, sgd"),
        ("{optimizer.name: momentum}", "{optimizer.lr: 0.1}", "11: space.optimizer.momentum.when.optimizer.lr: "
         "optimizer.lr varies as log, and a condition needs a value that comes up: a choice or int"),
        ("optimizer.betas.0", "optimizer.betas.2", "12: space.optimizer.betas.2: optimizer.betas is a list of 2: "
         "optimizer.betas.2 cannot be set in it"),
        ("optimizer.momentum:", "optimizer.one_minus_momentum:", "11: space.optimizer.one_minus_momentum: name the "
         "field itself: optimizer.momentum: {one_minus_log: [0.005, 0.3]} spreads 1 - x in the logarithm"),
        ("task_args.hidden:", "optimizer.lr.x:", "13: space.optimizer.lr.x: it lies inside optimizer.lr, which varies "
         "as a whole; give one of the two"),
        ("task_args.hidden:", "workers.max:", "13: space.workers.max: workers cannot be set here: all trials have the "
         "same workers; put it into set"),
        ("task_args.hidden:", "data.seed:", "13: space.data.seed: data.seed cannot be set here: a seed is no setting "
         "to tune; confirm repeats the best over seeds"),
        ("task_args.hidden:", "budget.steps:", "13: space.budget.steps: budget cannot be set here: "
         "objective.max_steps decides it"),
        ("{workers: {min: 2, max: 2}}", "{workers: {min: 3, max: 3}}", "4: data.slots 2 is less than workers.max 3"),
        ("{workers: {min: 2, max: 2}}", "{clip_nrom: 3}", "4: unknown key 'clip_nrom'; did you mean 'clip_norm'?"),
        ("{workers: {min: 2, max: 2}}", "{storage: x}", "4: set.storage: storage cannot be set here: storage of the "
         "sweep says where its trials lie"),
        ("{workers: {min: 2, max: 2}}", "{l1: {log: [1, 2]}}", "4: set.l1: set holds fixed values; what varies belongs "
         "into space"),
        ("{workers: {min: 2, max: 2}}", "{data: {eval: null}}", "3: base: objective.metric val_loss comes from an "
         "evaluation, and the base has no data.eval"),
        ("{workers: {min: 2, max: 2}}", "{data: {on_bad_shard: quarantine}}", "4: data.on_bad_shard: quarantine: a "
         "sweep leaves no shard out; set data.on_bad_shard to error, and mend the data"),
        ("optimizer.lr: {log", "data.on_bad_shard: {choice: [error, quarantine]}\n  optimizer.lr: {log", "8: "
         "space.data.on_bad_shard: data.on_bad_shard cannot be set here: all trials see the same data; put it "
         "into set"),
        ("base: train.yaml", "base: nope.yaml", "3: base: there is no file"),
        ("method: quasirandom", "method: sobol", "14: search.method: expected 'grid', 'random', 'quasirandom', "),
        ("every: 20", "every: 300", "6: objective: every 300 is more than max_steps 200"),
        ("grace: 20", "grace: 200", "16: early_stop.grace 200 of max_steps 200 stops no trial; lower it"),
        ("top_k: 1", "top_k: 17", "17: confirm.top_k 17 is more than the 16 trials of an arm"),
        ("top_k: 1", "studies: true", "17: confirm.studies needs mode fair and points that do not depend on others: "),
        ("per_arm: 16", "per_arm: 1.5", "15: budget: per_arm 1.5: trials are counted in whole numbers"),
        ("method: quasirandom", "method: pbt", "14: search.method pbt is its own early stopping, and its budget is "),
        ("kind: sweep", "kind: train", "1: kind: this is a train spec, and a sweep spec is wanted, whose base may be "),
        ("mode: search", "mode: fair", "5: mode fair compares two arms at least; give arms, or write mode: search"),
        ("name: search", "nmae: search", "2: unknown key 'nmae'; did you mean 'name'?"),
        ("name: search", "name: search\nstorage: s3://key:secret@bucket", "3: storage: the URL holds credentials"),
        ("name: search", "name: sea/rch", "2: name: "),
        ("name: search", "name: sea;rch", "2: name: "),
        ("set: {workers", "set: {task_args.api_key: abc, workers", "4: set.task_args.api_key: task_args"),
    ],
)  # fmt: skip
def test_a_problem_has_its_line_and_its_sentence(read: Read, old: str, new: str, expected: str) -> None:
    lines = problems(read, put(SEARCH, old, new))
    assert len(lines) == 1, lines
    assert lines[0].startswith(expected), lines[0]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("name: nesterov\n", "name: sgd\n", "8: two arms are called 'sgd'"),
        (
            "per_arm: 6}",
            "per_arm: 6}\nconfirm: {studies: true}",
            "13: budget.per_arm 6 leaves 5 studies less than two ",
        ),
        ("optimizer: {name: sgd}", "optimizer: {name: sgdd}", "9: arms.0.optimizer: optimizer 'sgdd' is none of"),
        ("optimizer: {name: sgd}", "optimizer: {nmae: sgd}", "9: arms.0.optimizer: unknown key 'nmae'; did you "),
        ("optimizer: {name: sgd}", "optimizer: {lr: {log: [1, 2]}}", "9: arms.0.optimizer: missing key 'name'"),
        ("optimizer: {name: sgd}", "optimizer: {name: 'm:C', eps: 1.0}", "9: optimizer: missing key 'lr'"),
        (
            "optimizer: {name: sgd}",
            "optimizer: {name: {choice: [sgd, adam]}}",
            "9: arms.0.optimizer.name: expected",
        ),
        ("{name: sgd, optimizer", "{name: sgd, baseline: true, optimizer", "8: two arms are the baseline"),
        ("lr: {log: [0.02, 5.0]}", "lr: {log: [5.0, 0.02]}", "11: arms.1.optimizer.lr: log [5, 0.02] is an empty"),
        (
            "lr: {log: [0.02, 5.0]}",
            "moment: {log: [0.02, 5.0]}",
            "11: optimizer: unknown key 'moment'; did you mean",
        ),
        ("space: default", "space: all", "12: arms.2.space: expected a mapping or 'default', got 'all'"),
    ],
)
def test_an_arms_problem_has_its_line(read: Read, old: str, new: str, expected: str) -> None:
    lines = problems(read, put(FAIR, old, new))
    assert lines[0].startswith(expected), lines


def test_all_problems_are_told_at_once(read: Read) -> None:
    text = put(put(SEARCH, "task_args.hidden:", "name:"), "[5.0e-3, 0.3]", "[0.3, 5.0e-3]")
    assert len(problems(read, text)) == 2


def test_the_shipped_sweeps_are_sweeps() -> None:
    for path in sorted(Path("pipelines").glob("*/*.yaml")):
        if path.name != "train.yaml":
            spec = read_sweep(path)
            assert arms_of(spec, base_of(spec)), path
            assert read_train(path.parent / "train.yaml") == base_of(spec)


def test_a_spec_is_read_without_ray_torch_and_numpy(read: Read, tmp_path: Path) -> None:
    read(SEARCH)
    code = (
        "import sys; from elastrain.sweeps.document import read_sweep; "
        "from elastrain.sweeps.forecast import forecast_sweep, as_text; "
        "as_text(forecast_sweep(read_sweep(sys.argv[1]))); "
        "print(sorted({'ray', 'torch', 'numpy', 'pyarrow', 'optuna', 'scipy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sweep.yaml")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
