"""Points from a model of what was told: Optuna's TPE and Gaussian process, without any state of theirs.

The study is made anew for each point: a point is a pure function of the points and values told so far, the seed and its
number. Fields are given to Optuna on their own scale, 0 to 1, and lists as categories, so that it sees what the spec
means; fields that are not active are not there. Needs the extra `optuna`.
"""

import random
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from elastrain.errors import SpecError
from elastrain.spec.sweep import LISTS, Dimension, SearchSpec
from elastrain.sweeps.dimensions import unit_of, value_at
from elastrain.sweeps.space import Arm, Point, draw
from elastrain.sweeps.trials import Outcome

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial

MODELS = ("tpe", "gp")
FIRST = 10  # points at random before the model is asked
_NEEDS = {"tpe": ("optuna",), "gp": ("optuna", "scipy", "torch")}


@dataclass(kw_only=True, slots=True)
class Told:
    """A point that was asked for, and what came of it; `outcome` is running until it is told."""

    number: int
    point: Point
    value: float | None = None
    outcome: Outcome = "running"
    step: int = 0


def check_installed(method: str) -> None:
    """Raise SpecError if a library is missing that `method` needs."""
    missing = [name for name in _NEEDS.get(method, ()) if find_spec(name) is None]
    if missing:
        raise SpecError(
            f"search.method {method} needs {' and '.join(missing)}: pip install 'elastrain[optuna]', "
            "or choose quasirandom"
        )


def suggest(arm: Arm, spec: SearchSpec, told: Iterable[Told], number: int, *, goal: str) -> Point:
    """Return point `number` after what was `told`; trials that still run count as they are, without a value.

    What diverged or failed is told as failed, from which the samplers learn nothing; a pruned trial with the value at
    the step where it ended. In a conditional space the Gaussian process draws at random what not all points have.

    Raises:
        SpecError: The extra is not installed.
    """
    check_installed(spec.method)
    import optuna  # noqa: PLC0415 -- an extra, and half a second

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it has advice only
    with warnings.catch_warnings():
        # Optuna warns of its own experimental arguments, which are pinned with it.
        warnings.simplefilter("ignore")
        seed = random.Random(f"{spec.seed}/{number}").getrandbits(32)  # noqa: S311 -- no secret
        study = optuna.create_study(
            direction="maximize" if goal == "max" else "minimize", sampler=_sampler(spec.method, seed)
        )
        study.add_trials([_trial(arm, each) for each in sorted(told, key=lambda each: each.number)])
        asked = study.ask()

        def pick(path: str, dimension: Dimension) -> Any:
            if dimension.kind in LISTS:
                return dimension.values[asked.suggest_categorical(path, range(len(dimension.values)))]
            return value_at(dimension, asked.suggest_float(path, 0.0, 1.0))

        return draw(arm, pick)


def _sampler(method: str, seed: int) -> "BaseSampler":
    from optuna.samplers import GPSampler, TPESampler  # noqa: PLC0415 -- an extra

    if method == "gp":
        return GPSampler(seed=seed, n_startup_trials=FIRST, warn_independent_sampling=False)
    return TPESampler(seed=seed, n_startup_trials=FIRST, multivariate=True, group=True)


def _trial(arm: Arm, told: Told) -> "FrozenTrial":
    """Return what was told as a trial of Optuna's."""
    from optuna.trial import TrialState, create_trial  # noqa: PLC0415 -- an extra

    state, value = TrialState.RUNNING, None
    between: Mapping[int, float] = {}
    if told.outcome == "finished" and told.value is not None:
        state, value = TrialState.COMPLETE, told.value
    elif told.outcome == "pruned" and told.value is not None:
        state, between = TrialState.PRUNED, {told.step: told.value}
    elif told.outcome != "running":
        state = TrialState.FAIL
    varying = {path: each for path, each in arm.dimensions.items() if path in told.point}
    return create_trial(
        state=state,
        value=value,
        params={path: _param(each, told.point[path]) for path, each in varying.items()},
        distributions={path: _distribution(each) for path, each in varying.items()},
        intermediate_values=dict(between),
    )


def _param(dimension: Dimension, value: Any) -> float:
    return dimension.values.index(value) if dimension.kind in LISTS else unit_of(dimension, value)


def _distribution(dimension: Dimension) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution  # noqa: PLC0415 -- an extra

    if dimension.kind in LISTS:
        return CategoricalDistribution(range(len(dimension.values)))
    return FloatDistribution(0.0, 1.0)
