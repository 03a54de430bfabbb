"""The decorator that makes a rule of a formula.

The author of a mechanism writes the formula on flat dicts `{path: tensor}` of the synapses it acts on. The decorator
does the rest: trees to dicts and back, the selection of synapses, hyperparameters that are floats, tensors or
schedules, checks, half precision, noise and memory.
"""

import dataclasses
import functools
import importlib
import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, cast, get_args

import torch
from torch import Tensor, nn

from biofunc.noise import Noise, init_keys
from biofunc.ranges import Interval
from biofunc.rule import INJECTED, Phase, Rule, compute_dtype
from biofunc.running import Flat
from biofunc.sharding import is_sharded, placed
from biofunc.state import BioState
from biofunc.trees import Leaves, Tree

__all__ = ["rule"]

P = ParamSpec("P")
Body = Callable[Concatenate[Leaves, Leaves, BioState, P], Flat]
OnTrees = Callable[Concatenate[Tree, Tree, BioState, P], tuple[Tree, Tree, BioState]]

GIVEN: Any = None
"""Default of a keyword that the decorator fills in, `noise: Noise = GIVEN`; callers never give it."""

REQUIRED: Any = inspect.Parameter.empty
"""Default of a signal without which the rule cannot run, `activity: Mapping[str, Tensor] = REQUIRED`."""


def rule(
    function: None = None,
    /,
    *,
    phase: Phase | None = None,
    ranges: Mapping[str, str] | None = None,
    choices: Mapping[str, tuple[Any, ...]] | None = None,
    checks: Mapping[str, Callable[[str, Any], None]] | None = None,
    init: Callable[..., BioState] | None = None,
    memory: Mapping[str, float] | None = None,
    redraws: bool = False,
    writes_rates: bool = False,
    applies_rates: bool = False,
    scale_free: bool = False,
    every_leaf: bool = False,
    once: bool = False,
) -> Callable[[Body[P]], OnTrees[P]]:
    """Makes a rule of a function `f(params, grads, state, *, keywords) -> (params, grads, state)`.

    The function gets `params` and `grads` as dicts `{path: tensor}` of the synapses alone, in float32 where the
    leaves are bfloat16 or float16, and returns dicts of the same paths and shapes. It never writes into what it is
    given: eager code without vmap refuses a rule that wrote into params or grads, elsewhere nobody notices. It treats
    leaf by leaf: in a tree of several dtypes or devices it is called once for each, with the leaves of that kind.
    Sharded leaves come as DTensors, and what it returns is placed like them again. It may declare two keywords that are
    filled in:

    - `noise`: `noise.draw(params, "normal", "uniform", "coin")` gives a list, one dict of draws per kind, shaped like
      the leaves (a coin is one uniform per leaf): `(z,) = noise.draw(params, "normal")`, then `z[path]`. All the noise
      of a step comes from one call.
    - `name`: the name of its slot; `state.slots[name]["trace"]` is what it kept, and
      `state.with_slot(name, trace=new)` is the state that keeps the new tensors.

    Args:
        function: never given; it is here so that `@bf.rule` without parentheses says what is missing.
        phase: "gradient" (reads the raw gradient, before the optimizer), "direction" (shapes the gradient or the
            update, before `descend`), "optimizer" (turns gradients into an update), "descend" (moves parameters) or
            "weights" (acts on them afterwards).
        ranges: the range of each numeric keyword in interval notation, `{"rate": "[0, 1)"}`. These keywords may
            be floats, 0-d tensors or schedules; floats are checked.
        choices: the values that other keywords may have, `{"selection": ("small", "random")}`.
        checks: for keywords of another kind, functions `(rule's name, value)` that raise when such a value is bound.
        init: `f(params, state, *, keywords) -> state` on the same dicts; may declare hyperparameters (they then
            cannot be given at a step), `noise`, `name`, and `redraws` (whether any rule re-draws synapses). Default:
            what `memory` says.
        memory: entries of the rule's slot, shaped like the weights, with the value they start at and return to
            where a synapse is re-drawn. An entry "innate" that init puts into the slot is left out of this: it holds
            the rates with which synapses are born.
        redraws: the rule puts new synapses in the place of old ones and calls `state.restart`.
        writes_rates: the rule changes `state.plasticity`.
        applies_rates: the rule multiplies the descent direction by `state.plasticity`.
        scale_free: an optimizer that divides constant factors of its gradient out again, as Adam does.
        every_leaf: hand over every leaf, not synapses alone.
        once: the rule acts once, before learning; a chain that moves parameters refuses it.

    Returns:
        A decorator; what it returns is called `(params, grads, state, **keywords)` on whole trees, the three trees by
        position.

    Raises:
        ValueError: the phase is unknown, a range is not in interval notation, or a default lies outside it.
        TypeError: a range, a choice or a check is given for a keyword that the function does not declare, or memory
            without values.
    """
    if memory is not None and not isinstance(memory, Mapping):
        raise TypeError(f"memory is {memory!r}; give a dict by name, with the value at the start: {{'trace': 0.0}}")
    if function is not None:
        raise TypeError("write @bf.rule(phase=…) above the function, with its parentheses")
    for given, what in ((ranges, "ranges"), (choices, "choices")):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"{what} is {given!r}; give a dict by name")
    if phase is None or phase not in get_args(Phase):
        raise ValueError(f"phase is {phase!r}; it must be one of {', '.join(get_args(Phase))}")

    def decorate(function: Body[P]) -> OnTrees[P]:
        signature = inspect.signature(function)
        keywords, init_keywords = _keyword_names(function), _keyword_names(init)
        at_init = tuple([name for name in init_keywords if name not in INJECTED])
        for name in [*(ranges or {}), *(choices or {}), *(checks or {}), *at_init]:
            if name not in keywords:
                hint = f"; make the argument keyword-only, (params, grads, state, *, {name}=…)"
                hint = hint if name in signature.parameters else ""
                raise TypeError(f"{function.__name__} declares no keyword '{name}'{hint}")
        made = Rule(
            name=function.__name__.lstrip("_"),
            phase=phase,
            transform=_Transform(function),
            initialise=functools.partial(_initialise, init, init_keywords) if init or memory else None,
            keywords=keywords,
            at_init=at_init,
            needs=tuple([n for n in keywords if n not in INJECTED and signature.parameters[n].default is REQUIRED]),
            ranges={
                name: Interval.parse(text, optional=signature.parameters[name].default is None)
                for name, text in (ranges or {}).items()
            },
            choices=dict(choices or {}),
            checks=dict(checks or {}),
            redraws=redraws,
            writes_rates=writes_rates,
            applies_rates=applies_rates,
            scale_free=scale_free,
            every_leaf=every_leaf,
            once=once,
            fresh=dict(memory or {}),
        )

        for name, interval in made.ranges.items():
            default = signature.parameters[name].default
            if isinstance(default, int | float) and default not in interval:
                raise ValueError(f"{made.name}: the default {name}={default} lies outside {interval.text}")

        @functools.wraps(function)
        def call(*given: Any, **keywords: Any) -> tuple[Tree, Tree, BioState]:
            if len(given) != 3:
                raise TypeError(
                    f"{made.name} takes (params, grads, state) by position, and got {len(given)} of them; "
                    f"functools.partial(bf.{made.name}, …) binds keywords"
                )
            return made(*given, **keywords)

        trees = [p.replace(kind=p.POSITIONAL_ONLY) for p in list(signature.parameters.values())[:3]]
        given = [p for p in list(signature.parameters.values())[3:] if p.name not in INJECTED]
        call.__signature__ = signature.replace(parameters=[*trees, *given])  # type: ignore[attr-defined]
        call.rule = made  # type: ignore[attr-defined]
        return cast(OnTrees[P], call)

    return decorate


@dataclasses.dataclass(frozen=True, eq=False)
class _Transform:
    """A formula on the leaves of a tree; pickled by name, under which its module has the decorated function."""

    function: Callable[..., Flat]

    def __call__(self, rule: Rule, params: Leaves, grads: Leaves, state: BioState, keywords: dict[str, Any]) -> Flat:
        return _transform(self.function, rule, params, grads, state, keywords)

    def __deepcopy__(self, memo: Any) -> "_Transform":
        return self

    def __reduce__(self) -> Any:
        module, name = self.function.__module__, self.function.__qualname__
        try:
            found = _transform_of(module, name)
        except (ImportError, AttributeError):
            found = None
        if not isinstance(found, _Transform) or found.function is not self.function:
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


def _initialise(
    init: Callable[..., BioState] | None,
    names: tuple[str, ...],
    rule: Rule,
    params: Leaves,
    state: BioState,
    redraws: bool,
) -> BioState:
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


def _keyword_names(function: Callable[..., Any] | None) -> tuple[str, ...]:
    if function is None:
        return ()
    parameters = inspect.signature(function).parameters.values()
    return tuple([p.name for p in parameters if p.kind is p.KEYWORD_ONLY])


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
