"""The shipped fair comparison with two seeds of its search: is each estimate inside the other run's interval?"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.script import finish, options
from benchmarks.sweep_digits.found import PIPELINE, shipped

import elastrain
from elastrain.elastic.session import ray_session
from elastrain.sweeps.document import read_sweep
from elastrain.sweeps.leaderboard import Leaderboard
from elastrain.sweeps.stats import Estimate

SEEDS = (0, 1)
SMALL = (
    "objective={metric: val_loss, every: 23, max_steps: 46, target: 2.0}",
    "early_stop=null",
    "confirm={seeds: 2, studies: true}",
    "budget.per_arm=4",
)
MEASURES = ("steps", "speed_up", "value")


def inside(one: Estimate, other: Estimate) -> bool:
    """Say whether an estimate lies in another one's interval; without one it has to be equal."""
    low, high = (other.value if end is None else end for end in (other.low, other.high))
    return low <= one.value <= high


def pairs(first: Leaderboard, second: Leaderboard) -> Iterator[tuple[str, Estimate, Estimate]]:
    """Return what both boards say of an arm, both ways; the baseline's speed-up is 1 by definition."""
    boards = [{row.arm: row for row in board.rows if row.kind == "tuned"} for board in (first, second)]
    for arm in boards[0]:
        for name in MEASURES:
            one, other = (getattr(board[arm], name) for board in boards)
            if (name == "speed_up" and arm == first.scoring.baseline) or one is None or other is None:
                continue
            yield f"{arm}: {name} of the second run", one, other
            yield f"{arm}: {name} of the first run", other, one


def main() -> None:
    """Compare twice; report how many estimates are inside."""
    given = options()
    boards: list[Leaderboard] = []
    with tempfile.TemporaryDirectory() as name, ray_session(None, cpus=2):
        for seed in SEEDS:
            changes = [*shipped(f"fair-{seed}", Path(name), given["data"]), *(SMALL if given["small"] else ())]
            found = elastrain.sweep(read_sweep(PIPELINE / "fair.yaml", [*changes, f"search.seed={seed}"]))
            print(found.as_text(), file=sys.stderr)
            boards.append(found.board)
    told = [(what, inside(estimate, other), estimate, other) for what, other, estimate in pairs(*boards)]
    for what, _, estimate, other in (each for each in told if not each[1]):
        print(f"{what}: {estimate.value:g} is outside {other.low} to {other.high}", file=sys.stderr)
    arms = len({row.arm for row in boards[0].rows})
    finish({"inside": sum(each[1] for each in told), "estimates": len(told)}, {"arms": arms})


if __name__ == "__main__":
    main()
