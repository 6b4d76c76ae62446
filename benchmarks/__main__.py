"""Run the benchmarks: `python -m benchmarks [CASE ...] [--pairs N] [--small] [--json FILE]`."""

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, table
from benchmarks.harness import ROOT, BenchmarkError, Case, run_case

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def cases() -> list[str]:
    """Return the names of the cases: the folders with a case.py."""
    return sorted(path.parent.name for path in HERE.glob("*/case.py"))


def short_cases() -> list[str]:
    """Return the cases of a call without names: all whose case.py does not say LONG."""
    return [name for name in cases() if not getattr(_module(name), "LONG", False)]


def load_case(name: str, *, work: Path, small: bool) -> Case:
    """Return a case, its data made in `work` where they are not there yet."""
    case: Case = _module(name).make(work, small=small)
    return case


def _module(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}.case")


def main() -> int:
    """Run what the command line asks for; return the exit code: 0, 1 if a side failed or did other work."""
    given = _parse()
    results: list[dict[str, Any]] = []
    for name in given.cases or short_cases():
        case = load_case(name, work=given.work, small=given.small)
        try:
            result = run_case(case, pairs=given.pairs, say=lambda line: print(line, file=sys.stderr, flush=True))
        except BenchmarkError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        results.append(result)
        if not given.small:
            _keep(result)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table.markdown(results))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="ours, the peers and the physical limit")
    parser.add_argument(
        "cases",
        nargs="*",
        metavar="CASE",
        help=f"one or more of {', '.join(cases())}; without a name all but the long ones",
    )
    parser.add_argument("--pairs", type=int, default=6, help="runs of each side (default 6)")
    parser.add_argument("--small", action="store_true", help="sizes for a test of the benchmarks themselves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results there")
    parser.add_argument("--work", type=Path, default=ROOT / "data" / "benchmarks", help="where data are made and kept")
    given = parser.parse_args()
    unknown = sorted(set(given.cases) - set(cases()))
    if unknown:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(cases())}")
    if given.pairs < 1:
        parser.error("--pairs must be at least 1")
    return given


def _keep(result: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = RESULTS / f"{result['case']}-{stamp}-{machine.facts()['commit']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
