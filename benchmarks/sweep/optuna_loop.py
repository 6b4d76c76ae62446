"""Plain Optuna: ask and tell in one process, one trial after the other."""

import functools
import time

import optuna
import torch
from benchmarks.script import finish, options, started
from benchmarks.sweep.work import Rows, check, measured, settings, train


def main() -> None:
    """Try every setting once, the way one does with a grid of one's own; report."""
    given, began = options(), started()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows, tried = Rows(given["rows"], 1), settings(small=given["small"])
    study = optuna.create_study()
    for rate, width in tried:
        study.enqueue_trial({"rate": rate, "width": width})
    ended, losses = [], {}
    for place in range(len(tried)):
        trial = study.ask()
        setting = trial.suggest_float("rate", 1e-5, 1e-1, log=True), trial.suggest_int("width", 8, 256)
        losses[place] = train(setting, rows, steps=given["steps"], report=functools.partial(_report, trial))
        study.tell(trial, losses[place])
        ended.append(time.time())
    furthest = check(losses, rows)
    finish({**measured(began, ended, len(tried)), "furthest": furthest}, {"trials": len(tried)})


def _report(trial: optuna.Trial, step: int, loss: float) -> None:
    trial.report(loss, step)


if __name__ == "__main__":
    main()
