"""Which leaves of a tree are synapses, and which of them a rule acts on."""

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from biofunc import trees
from biofunc.trees import Leaves, Tree
from biofunc.wrappers import unwrapped

__all__ = ["Selection", "layers"]

Selection = str | Callable[[str, Tensor], bool] | Tree
"""A glob on paths ("fc*.weight"), a predicate `(path, leaf) -> bool`, or a tree of bools like the parameters."""


def layers(model: nn.Module, *types: type[nn.Module]) -> Callable[[str, Tensor], bool]:
    """Selects the weights of a module's layers of the given types.

    Args:
        model: the module whose `named_parameters` the parameter dict comes from.
        types: layer classes, `layers(model, nn.Linear, nn.Conv2d)`; subclasses count.

    Returns:
        A predicate for `where=`: true for the parameters of two or more dimensions that belong to such a layer.

    Raises:
        TypeError: model is not a module, or a type not a layer class.
        ValueError: the model has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; layers takes an nn.Module and layer classes")
    for kind in types:
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise TypeError(f"types holds {kind!r}; give layer classes, bf.layers(model, torch.nn.Linear)")
    chosen = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, types)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() >= 2
    }
    # The names in a wrapper's own parameters and those without its prefix; a tied parameter has its first name
    named = [*model.named_parameters(), *unwrapped(model).named_parameters()]
    names = {path for path, parameter in named if id(parameter) in chosen}
    if not names:
        raise ValueError(f"the model has no layer of type {', '.join([t.__name__ for t in types]) or '(none given)'}")
    return ByPath(frozenset(names))


@dataclasses.dataclass(frozen=True)
class ByPath:
    """Selects by path; a class, so that it can be pickled."""

    names: frozenset[str]

    def __call__(self, path: str, leaf: Tensor) -> bool:
        return path in self.names


def is_synapse(path: str, leaf: Tensor) -> bool:
    """The default selection: weights are leaves of two or more dimensions; biases and gains are not."""
    return leaf.dim() >= 2


_SELECTIONS = "a glob on paths, a predicate, a tree of bools like the parameters, or bf.layers(model, torch.nn.Linear)"


@dataclasses.dataclass(frozen=True)
class Mask:
    """A mask tree as a flat dict."""

    flags: dict[str, Any]


def prepared(where: Selection) -> Selection:
    """The selection in a form that a compiled step can use: a mask tree is flattened once, outside the trace."""
    if where is None:
        raise TypeError(f"where is None; give {_SELECTIONS}")
    return where if isinstance(where, str) or callable(where) else _mask(where)


def _mask(where: Tree) -> Mask:
    if isinstance(where, list | tuple) and where and all([isinstance(entry, str) for entry in where]):
        raise TypeError(
            f"where is {where!r}, and a list is read as a tree of bools; give a glob on paths, '*.weight', or a "
            "predicate, lambda path, leaf: path in {…}"
        )
    return where if isinstance(where, Mask) else Mask(trees.flatten(where)[0])


def _matches(path: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(path, glob)


# All that torch.compiler.assume_constant_result does, but for importing the compiler, which takes 0.7 s
_matches._dynamo_marked_constant = True  # type: ignore[attr-defined]


def select_paths(where: Selection, params: Leaves) -> list[str]:
    """Paths of the leaves that a selection picks, in the order of the tree.

    Raises:
        KeyError: a mask tree has other paths than the parameters.
        TypeError: a mask leaf is not a bool.
        ValueError: nothing is selected.
    """
    if isinstance(where, str):
        chosen = [path for path in params if _matches(path, where)]
    elif callable(where):
        chosen = [path for path, leaf in params.items() if where(path, leaf)]
    else:
        chosen = _from_mask(_mask(where).flags, params)
    if not chosen:
        shown = where if isinstance(where, str) else getattr(where, "__name__", "mask")
        raise ValueError(f"where={shown!r} selects no synapse; the paths are: {', '.join(params) or '(none)'}")
    return chosen


def _from_mask(mask: dict[str, Any], params: Leaves) -> list[str]:
    for path, flag in mask.items():
        if not path and path not in params:
            raise TypeError(f"where is {flag!r}; give {_SELECTIONS}")
        if path not in params:
            raise KeyError(f"where has a leaf '{path}' that params lacks")
        if not isinstance(flag, bool):
            shown = f"a tensor of dtype {flag.dtype}" if isinstance(flag, Tensor) else repr(flag)
            raise TypeError(f"where leaf '{path}' is {shown}; a mask tree holds True or False for each leaf of params")
    for path in params:
        if path not in mask:
            raise KeyError(f"where has no leaf '{path}' that params has; a mask tree holds one bool per leaf")
    return [path for path in params if mask[path]]


def warn_of_stack(name: str, params: Leaves, remedy: str) -> None:
    """Warns where every bias has two dimensions or more, a weight three, and all leaves as many members: a stack."""
    biases = [path for path in params if path.replace("/", ".").rpartition(".")[2] == "bias"]
    members = {leaf.shape[0] if leaf.dim() else None for leaf in params.values()}
    stacked = any([leaf.dim() > 2 for leaf in params.values()])
    if biases and stacked and len(members) == 1 and all([params[path].dim() > 1 for path in biases]):
        warnings.warn(
            f"{name} look like the stack of an ensemble: '{biases[0]}' has shape {tuple(params[biases[0]].shape)} and "
            f"passes for a synapse; {remedy}, or name the synapses with where=",
            stacklevel=4,
        )
