"""The decorator that makes a rule of a formula.

The author of a mechanism writes the formula on flat dicts `{path: tensor}` of the synapses it acts on. The decorator
does the rest: trees to dicts and back, the selection of synapses, hyperparameters that are floats, tensors or
schedules, checks, half precision, noise and memory.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, cast, get_args

from biofunc.body import Transform, initialise
from biofunc.ranges import Interval
from biofunc.rule import INJECTED, Phase, Rule
from biofunc.running import Flat
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
            transform=Transform(function),
            initialise=functools.partial(initialise, init, init_keywords) if init or memory else None,
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


def _keyword_names(function: Callable[..., Any] | None) -> tuple[str, ...]:
    if function is None:
        return ()
    parameters = inspect.signature(function).parameters.values()
    return tuple([p.name for p in parameters if p.kind is p.KEYWORD_ONLY])
