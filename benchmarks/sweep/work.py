"""What all sides train: the same network, settings, rows and order, from one file that needs nothing of ours to read.

`rows.npz` holds for one and for two slots which rows are in which step, as our plan has it, and the final losses that a
plain loop comes to. A side whose loss of any setting is further than `TOLERANCE` (of two workers `LOOSE`) from that did
other work.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

BATCH, EVERY = 64, 20
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
WIDTHS = (32, 64, 96, 128)
STEPS, SMALL_STEPS, LONG_STEPS = 200, 40, 2000
TOLERANCE = 1e-6
LOOSE = 1e-4  # of two workers: a sum over processes rounds otherwise, and 200 steps at a high rate enlarge that
RECORDED_STEPS, RECORDED_EVERY = 270, 10

Setting = tuple[float, int]
Report = Callable[[int, float], None]


def settings(*, small: bool) -> list[Setting]:
    """Return (learning rate, width) of each trial: 32, or 4 small ones."""
    return list(itertools.product(RATES[2:4], WIDTHS[:2]) if small else itertools.product(RATES, WIDTHS))


def recorded_settings(*, small: bool) -> list[Setting]:
    """Return (learning rate, width) of 64 trials, or 16, in a shuffled order."""
    rates, widths = np.geomspace(1e-4, 1e-1, 4 if small else 16), (16, *WIDTHS[1:])
    found = [(float(rate), width) for rate in rates for width in widths]
    return [found[place] for place in np.random.default_rng(0).permutation(len(found))]


class Rows:
    """The rows in memory as tensors, and which of them are in each slot of each step."""

    def __init__(self, path: str, slots: int) -> None:
        with np.load(path) as held:
            self.image, self.label = _tensors(held["image"], held["label"])
            self.eval_image, self.eval_label = _tensors(held["eval_image"], held["eval_label"])
            self.seed = int(held["seed"])
            self.order: np.ndarray[Any, Any] = held[f"order_{slots}"]
            self.expected = held.get(f"loss_{slots}")

    def batch(self, step: int, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images (rows, 64) and labels of a slot in a step."""
        rows = self.order[step, slot]
        rows = torch.from_numpy(rows[rows >= 0])
        return self.image[rows], self.label[rows]


@functools.cache
def rows_of(path: str, slots: int) -> Rows:
    """Return the rows, read once a process."""
    return Rows(path, slots)


def _tensors(image: np.ndarray[Any, Any], label: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(image).flatten(1).float() / 16, torch.from_numpy(label).long()


def train(  # noqa: PLR0913 -- all that a loop by hand is told
    setting: Setting,
    rows: Rows,
    *,
    steps: int,
    every: int = EVERY,
    slots: Sequence[int] = (0,),
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    schedule: Callable[[float], float] | None = None,
    report: Report = lambda _step, _loss: None,
) -> float:
    """Train as one does by hand; call `report(step, validation loss)` every so many steps and return the last loss.

    `schedule` is the learning rate's factor at a share of the steps.
    """
    rate, width = setting
    torch.manual_seed(rows.seed)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    loss = 0.0
    for step in range(steps):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = rate * schedule(step / steps)
        optimizer.zero_grad()
        for slot in slots:
            image, label = rows.batch(step, slot)
            (functional.cross_entropy(wrapped(image), label) / len(slots)).backward()
        optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                total = functional.cross_entropy(model(rows.eval_image), rows.eval_label, reduction="sum")
            loss = float(total) / len(rows.eval_label)
            report(step + 1, loss)
    return loss


def check(found: Mapping[int, float], rows: Rows) -> float:
    """Return how far a loss is from the expected one at most, by the trial's place in the list; end if too far."""
    assert rows.expected is not None
    furthest = float(np.max(np.abs([loss - float(rows.expected[place]) for place, loss in found.items()])))
    most = TOLERANCE if rows.order.shape[1] == 1 else LOOSE
    if not furthest <= most:
        raise SystemExit(f"void: a final loss is {furthest:g} from that of the plain loop, more than {most:g}")
    return furthest


def measured(began: float, ended: Sequence[float], trials: int) -> dict[str, float]:
    """Return what a side's trials took: `ended` are the times of their ends, `trials` how many are counted on.

    Where fewer were run than counted on, each of the others takes what those after the first one took.
    """
    ends = sorted(ended)
    first_s = ends[0] - began
    trial_s = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else first_s
    all_s = ends[-1] - began + trial_s * (trials - len(ends))
    return {"first_s": first_s, "trial_s": trial_s, "all_s": all_s, "trials_per_h": 3600.0 * trials / all_s}
