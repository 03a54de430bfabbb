"""Runs the body of a decorated rule on the leaves of a tree.

A body sees the leaves of one compute dtype and device at a time, half precision in float32, values of hyperparameters
and its noise. What it hands back is checked, and is cast and placed like what it was given.
"""

import dataclasses
import importlib
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from biofunc.noise import Noise, init_keys
from biofunc.rule import Rule, compute_dtype
from biofunc.running import Flat
from biofunc.sharding import is_sharded, placed
from biofunc.state import BioState
from biofunc.trees import Leaves


@dataclasses.dataclass(frozen=True, eq=False)
class Transform:
    """A formula on the leaves of a tree; pickled by name, under which its module has the decorated function."""

    function: Callable[..., Flat]

    def __call__(self, rule: Rule, params: Leaves, grads: Leaves, state: BioState, keywords: dict[str, Any]) -> Flat:
        return _transform(self.function, rule, params, grads, state, keywords)

    def __deepcopy__(self, memo: Any) -> "Transform":
        return self

    def __reduce__(self) -> Any:
        module, name = self.function.__module__, self.function.__qualname__
        try:
            found = _transform_of(module, name)
        except (ImportError, AttributeError):
            found = None
        if not isinstance(found, Transform) or found.function is not self.function:
            raise pickle.PicklingError(
                f"{module} has no rule '{name}'; to pickle a rule, decorate it where it is defined"
            )
        return _transform_of, (module, name)


def _transform_of(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name).rule.transform


def _transform(
    function: Callable[..., Flat],
    rule: Rule,
    params: Leaves,
    grads: Leaves,
    state: BioState,
    keywords: dict[str, Any],
) -> Flat:
    if rule.initialise is not None and rule.name not in state.slots:
        raise KeyError(
            f"state was made without {rule.name}; hand the rule to bf.init(params, key, …), or call chain.init"
        )
    values = rule.resolve(keywords, state)
    params, grads = dict(params), dict(grads)
    for dtype, paths in _groups(params, rule.acts_on(params, state.plasticity)):
        weights = {path: _detached(params[path], params[path]).to(dtype) for path in paths}
        directions = {path: _detached(params[path], grads[path]).to(dtype) for path in paths}
        given = _cast(values, rule, dtype)
        if "noise" in rule.keywords:
            given["noise"] = Noise(keywords["noise"][rule.name])
        if "name" in rule.keywords:
            given["name"] = rule.name
        writes = _writes(weights, directions)
        result = function(dict(weights), dict(directions), state, **given)
        _check_writes(rule.name, weights, directions, writes)
        if not (isinstance(result, tuple) and len(result) == 3):
            raise ValueError(f"{rule.name} must return (params, grads, state)")
        _check_slot(rule.name, result[2], state)
        new_weights, new_directions, new_state = result
        state = _placed(new_state, state) if any(is_sharded(weight) for weight in weights.values()) else new_state
        for path in paths:
            params[path] = _back(rule, "params", path, new_weights, weights, params)
            grads[path] = _back(rule, "grads", path, new_directions, directions, grads)
    return params, grads, state


def initialise(
    init: Callable[..., BioState] | None,
    names: tuple[str, ...],
    rule: Rule,
    params: Leaves,
    state: BioState,
    redraws: bool,
) -> BioState:
    """Makes a rule's slot.

    Args:
        init: the init given to the decorator; None if the slot starts with the values of `memory`.
        names: the keywords that it declares.
        rule: the rule of which it is the init.
        params: parameters by path.
        state: without the slot.
        redraws: whether any rule re-draws synapses.

    Returns:
        The state with the slot.
    """
    state = state.replace(
        slots={**state.slots, rule.name: {}},
        fresh=(*state.fresh, *[(rule.name, entry, value) for entry, value in rule.fresh.items()]),
    )
    for dtype, paths in _groups(params, rule.acts_on(params, state.plasticity)):
        weights = {path: _detached(params[path], params[path]).to(dtype) for path in paths}
        if init is None:
            entries = {
                entry: {
                    path: torch.full_like(w, value) + state.step.to(w.device, w.dtype) for path, w in weights.items()
                }
                for entry, value in rule.fresh.items()
            }
            state = state.with_slot(rule.name, **entries)
            continue
        given = _cast({name: value for name, value in rule.bound.items() if name in names}, rule, dtype)
        if "noise" in names:
            given["noise"] = Noise(init_keys(state, rule.name, paths))
        if "name" in names:
            given["name"] = rule.name
        if "redraws" in names:
            given["redraws"] = redraws
        state = init(weights, state, **given)
    return state


def _groups(leaves: Leaves, paths: list[str]) -> list[tuple[torch.dtype, list[str]]]:
    """Paths by compute dtype and device: within a group, hyperparameters and noise can be shared."""
    groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for path in paths:
        groups.setdefault((compute_dtype(leaves[path]), leaves[path].device), []).append(path)
    return [(dtype, members) for (dtype, _), members in groups.items()]


def _cast(values: Mapping[str, Any], rule: Rule, dtype: torch.dtype) -> dict[str, Any]:
    """Tensor hyperparameters in the compute dtype: under vmap a 0-d float64 would promote a float32 leaf."""
    return {
        name: value.to(dtype) if name in rule.ranges and isinstance(value, Tensor) else value
        for name, value in values.items()
    }


def _detached(param: Tensor, leaf: Tensor) -> Tensor:
    """A module's own Parameter and its gradient enter by value: else each step would hang on the graph of the last."""
    return leaf.detach() if isinstance(param, nn.Parameter) else leaf


def _placed(new: BioState, old: BioState) -> BioState:
    """The new state with the placements of the old one: operations on DTensors choose their own."""

    def back(leaves: Leaves, before: Leaves) -> Leaves:
        return {path: placed(leaf, before[path]) if path in before else leaf for path, leaf in leaves.items()}

    slots = {
        name: {entry: back(leaves, old.slots[name][entry]) for entry, leaves in slot.items()}
        for name, slot in new.slots.items()
    }
    fields = {name: back(getattr(new, name), getattr(old, name)) for name in ("plasticity", "polarity", "activity")}
    return new.replace(slots=slots, **fields)


def _writes(params: Leaves, grads: Leaves) -> list[int]:
    """How often each tensor that a rule is handed was written into; nothing where nobody counts that."""
    if torch.compiler.is_compiling():
        return []
    try:
        return [leaf._version for leaf in [*params.values(), *grads.values()]]
    except RuntimeError:  # torch.inference_mode counts no writes
        return []


def _check_writes(name: str, params: Leaves, grads: Leaves, before: list[int]) -> None:
    """Raises a ValueError that names the first leaf into which a rule wrote."""
    after = _writes(params, grads)
    if after != before:
        places = [*[f"params leaf '{path}'" for path in params], *[f"grads leaf '{path}'" for path in grads]]
        changed = [place for place, old, new in zip(places, before, after, strict=True) if new != old]
        raise ValueError(f"{name} wrote into {changed[0]} in place; make a new tensor, 0.9 * w for w.mul_(0.9)")


def _check_slot(name: str, new: BioState, old: BioState) -> None:
    """A slot keeps its structure: entries, paths and shapes exist from init on."""
    for entry, leaves in new.slots.get(name, {}).items():
        kept = old.slots.get(name, {}).get(entry)
        if kept is None:
            raise ValueError(f"{name} kept an entry '{entry}' that it did not have at init; declare it as memory")
        for path, leaf in leaves.items():
            if path not in kept or leaf.shape != kept[path].shape:
                raise ValueError(f"{name} kept '{entry}' of '{path}' in another shape than it had at init")


def _back(rule: Rule, tree: str, path: str, new: Leaves, given: Leaves, original: Leaves) -> Tensor:
    """The original object where the rule left the leaf alone, else the new value in the original's dtype."""
    if path not in new:
        raise ValueError(f"{rule.name} returned {tree} without '{path}'; it must return every path it was given")
    if new[path] is given[path]:
        return original[path]
    if new[path].shape != given[path].shape:
        shapes = f"{tuple(new[path].shape)} instead of {tuple(given[path].shape)}"
        raise ValueError(f"{rule.name} returned {tree} leaf '{path}' of shape {shapes}")
    return placed(new[path], given[path]).to(original[path].dtype)
