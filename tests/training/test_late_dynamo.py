"""The compiler, and sympy, is loaded by who compiles: training needs it for nothing, and comes out the same with it."""

import subprocess
import sys

import pytest

TRAIN = """
import sys
from tests.training.harness import Classifier, Setup, make_spec, train_alone
from elastrain.training.late_dynamo import defer_dynamo
from elastrain.training.precision import fix_arithmetic

defer_dynamo() if {late} else __import__("torch._dynamo")
fix_arithmetic("bitwise")
for name in ("adamw", "sgd", "muon", "adagrad", "nadam"):
    setup = Setup(spec=make_spec(**{{"optimizer.name": name}}), kind=Classifier)
    print(train_alone(setup)[1]["weights_sha256"])
print(sum(name.startswith(("torch._dynamo.", "torch._inductor", "sympy")) for name in sys.modules), file=sys.stderr)
"""
COMPILE = """
import sys, threading, torch
from elastrain.training.late_dynamo import defer_dynamo

defer_dynamo()
defer_dynamo()  # once more does nothing
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.AdamW(model.parameters())
{first}
compiled = torch.compile(model, backend="eager")
compiled(torch.ones(1, 3)).sum().backward()
optimizer.step()
assert torch.equal(compiled(torch.ones(1, 3)), model(torch.ones(1, 3)))
assert "torch._dynamo.convert_frame" in sys.modules
assert torch._dynamo is sys.modules["torch._dynamo"]
assert torch._dynamo.disable.__module__.startswith("torch._dynamo"), "the real one has taken its place"
try:
    torch._dynamo.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
"""
THREADS = """
found = []
threads = [threading.Thread(target=lambda: found.append(torch._dynamo.config.cache_size_limit)) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(found) == 4
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)


def test_no_optimizer_loads_the_compiler_and_weights_are_those_with_it() -> None:
    late, loaded = (run(TRAIN.format(late=late)) for late in (True, False))
    assert late.stdout == loaded.stdout
    assert len(set(late.stdout.split())) == 5
    assert int(late.stderr.split()[-1]) == 0 < int(loaded.stderr.split()[-1])


@pytest.mark.parametrize("first", ["", "import torch._inductor.config", THREADS])
def test_who_compiles_has_all_of_it(first: str) -> None:
    run(COMPILE.format(first=first))
