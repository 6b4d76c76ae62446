"""What each parameter of a model is, told from the modules that hold it: what decays, and what Muon turns."""

from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from elastrain.errors import SpecError

Kind = Literal["norms", "biases", "embeddings", "output", "matrices", "others"]
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def kinds_of(model: nn.Module, named: Mapping[str, nn.Parameter]) -> dict[str, Kind]:
    """Return what each of a phase's parameters is: the first of these kinds that fits it.

    - `norms`: in a normalisation layer: one of torch's, or a module without children whose class is called …Norm…
    - `embeddings`: in an `nn.Embedding` or `nn.EmbeddingBag`, also where an output layer shares it
    - `biases`: of fewer than two dimensions, or with `bias` in the last part of its name
    - `output`: the weight of the last `nn.Linear`, in the order of `model.modules()`, that the phase trains
    - `matrices`: of two dimensions; these are the hidden matrices
    - `others`: of more dimensions, such as a convolution's kernels
    """
    trained = {id(parameter) for parameter in named.values()}
    by_module: dict[int, Kind] = {}
    output = set[int]()
    for module in model.modules():
        held = {id(parameter) for parameter in module.parameters()}
        if _is_norm(module):
            by_module.update(dict.fromkeys(held, "norms"))
        elif isinstance(module, EMBEDDINGS):
            by_module.update(dict.fromkeys(held, "embeddings"))
        elif isinstance(module, nn.Linear) and held & trained:
            output = held
    return {name: by_module.get(id(p)) or _by_shape(name, p, output) for name, p in named.items()}


def _by_shape(name: str, parameter: nn.Parameter, output: set[int]) -> Kind:
    if parameter.dim() < 2 or "bias" in name.rpartition(".")[2]:
        return "biases"
    if id(parameter) in output:
        return "output"
    return "matrices" if parameter.dim() == 2 else "others"


def _is_norm(module: nn.Module) -> bool:
    called = "norm" in type(module).__name__.lower() and next(module.children(), None) is None
    return called or isinstance(module, NORMS)


def decay_groups(
    named: Mapping[str, nn.Parameter], kinds: Mapping[str, Kind], no_decay: Collection[str]
) -> list[dict[str, Any]]:
    """Return one group of parameters that decay, and one of those of a kind in `no_decay`; none that is empty.

    >>> named = {"a": nn.Parameter(), "b": nn.Parameter()}
    >>> [sorted(group) for group in decay_groups(named, {"a": "matrices", "b": "biases"}, ("biases",))]
    [['params'], ['params', 'weight_decay']]
    """
    decays = [parameter for name, parameter in named.items() if kinds[name] not in no_decay]
    stays = [parameter for name, parameter in named.items() if kinds[name] in no_decay]
    groups: list[dict[str, Any]] = [{"params": decays}, {"params": stays, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def hidden_matrices(kinds: Mapping[str, Kind], not_hidden: Sequence[str]) -> list[str]:
    """Return the names of the hidden matrices, without those that a pattern such as `*.positions` matches.

    Raises SpecError if a pattern matches no parameter.
    """
    for pattern in not_hidden:
        if not any(fnmatchcase(name, pattern) for name in kinds):
            raise SpecError(f"optimizer.args.not_hidden: {pattern!r} matches none of {', '.join(kinds)}")
    matrices = [name for name, kind in kinds.items() if kind == "matrices"]
    return [name for name in matrices if not any(fnmatchcase(name, pattern) for pattern in not_hidden)]
