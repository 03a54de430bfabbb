"""What a rule is.

A rule is a function `rule(params, grads, state, *, hyperparameters, signals) -> (params, grads, state)` with the facts
that a chain needs to order it, to key its noise and to make its state. The decorator `rule` makes rules of formulas;
`every`, `where` and `named` make rules of rules.
"""

import dataclasses
import difflib
import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from biofunc import random, trees
from biofunc.noise import step_noise
from biofunc.state import BioState
from biofunc.trees import Leaves, Tree

__all__ = ["Hyperparameter", "Rule", "named"]

Hyperparameter: TypeAlias = Any
"""What a caller gives: a number, a 0-d tensor (it can be vmapped and differentiated), or a function of the step. What
a rule's body sees: the number or the tensor."""

Phase = Literal["gradient", "direction", "optimizer", "descend", "weights"]
Flat = tuple[Leaves, Leaves, BioState]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range in interval notation, "[0, 1)"; optional: None stands for "not used"."""

    text: str
    optional: bool = False

    def __contains__(self, value: float) -> bool:
        low, high = [float(bound) for bound in self.text[1:-1].split(",")]
        above = value >= low if self.text[0] == "[" else value > low
        return above and (value <= high if self.text[-1] == "]" else value < high)


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Rule:
    """A rule with the facts that a chain needs; made by the decorator `rule`, by `every`, `where` and `named`.

    Attributes:
        name: the name under which noise is keyed and memory is kept.
        phase: where it may stand: "gradient" before the optimizer, "direction" before `descend`, "optimizer",
            "descend", or "weights" after it.
        transform: `(rule, params, grads, state, keywords) -> (params, grads, state)` on flat dicts.
        initialise: `(rule, params, state, redraws) -> state` on flat dicts, or None when it keeps nothing.
        accepts: names of its keywords.
        at_init: those of them that act at init alone.
        ranges: the range of each numeric keyword.
        bound: values bound to keywords.
        draws: it uses noise.
        redraws: it puts new synapses in the place of old ones.
        writes_rates: it changes `state.plasticity`.
        applies_rates: it multiplies the descent direction by `state.plasticity`.
        every_leaf: it acts on every leaf, not on synapses alone.
        fresh: fresh value of each entry of its slot, for re-drawn synapses.
        frame: how it is shown inside what wraps it, "every(100, {})".
    """

    name: str
    phase: Phase
    transform: Callable[["Rule", Leaves, Leaves, BioState, dict[str, Any]], Flat]
    initialise: Callable[["Rule", Leaves, BioState, bool], BioState] | None
    accepts: tuple[str, ...]
    at_init: tuple[str, ...]
    ranges: Mapping[str, Interval]
    bound: Mapping[str, Any]
    draws: bool
    redraws: bool
    writes_rates: bool
    applies_rates: bool
    every_leaf: bool
    fresh: Mapping[str, float]
    frame: str = "{}"

    def __call__(self, params: Tree, grads: Tree, state: BioState, **keywords: Any) -> tuple[Tree, Tree, BioState]:
        """Applies the rule once, by itself.

        Args:
            params: tree of parameters.
            grads: tree of descent directions, like params.
            state: made by `init` with this rule.
            keywords: hyperparameters and signals.

        Returns:
            New params, grads and state. The state's step stays; its key moves on if the rule draws.

        Raises:
            TypeError, ValueError, KeyError: as the message says; nothing is changed then.
        """
        for name in keywords:
            self.check_keyword(name, at_step=True)
        flat_params, flat_grads, structures = flatten_inputs(params, grads, state)
        if self.draws:
            keywords = {**keywords, "noise": step_noise(state, [self.name], list(flat_params))[self.name]}
        new_params, new_grads, new_state = self.transform(self, flat_params, flat_grads, state, keywords)
        if self.draws:  # two calls are two draws
            new_state = new_state.replace(key=random.fold_in(new_state.key, 0))
        return trees.unflatten(structures[0], new_params), trees.unflatten(structures[1], new_grads), new_state

    def bind(self, **keywords: Any) -> "Rule":
        """A copy with values bound to keywords; they reach the rule's init too."""
        for name, value in keywords.items():
            self.check_keyword(name, at_step=False)
            self._check_value(name, value)
        return dataclasses.replace(self, bound={**self.bound, **keywords})

    def check_keyword(self, name: str, *, at_step: bool) -> None:
        if name not in self.accepts:
            close = difflib.get_close_matches(name, self.accepts, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"it takes: {', '.join(self.accepts) or 'none'}"
            raise TypeError(f"{self.name} takes no keyword '{name}'; {hint}")
        if at_step and name in self.at_init:
            raise TypeError(
                f"{self.name}: {name} acts at init and cannot be given at a step; "
                f"make the state with bf.init(params, key, functools.partial(bf.{self.name}, {name}=…))"
            )

    def _check_value(self, name: str, value: Any) -> None:
        if name not in self.ranges or (value is None and self.ranges[name].optional):
            return
        if isinstance(value, Tensor):
            if value.dim():
                raise ValueError(
                    f"{self.name}: {name} has shape {tuple(value.shape)}; it must be a number or a 0-d tensor: "
                    "torch.vmap tries several values"
                )
            return
        if callable(value):
            if name in self.at_init:
                raise TypeError(f"{self.name}: {name} acts at init and takes no schedule; give a number or a tensor")
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(
                f"{self.name}: {name} is {value!r}; it must be a number, a 0-d tensor"
                + ("" if name in self.at_init else " or a schedule")
            )
        if float(value) not in self.ranges[name]:
            raise ValueError(f"{self.name}: {name} is {value}; it must lie in {self.ranges[name].text}")

    def resolve(self, keywords: Mapping[str, Any], state: BioState) -> dict[str, Any]:
        """Bound and given keywords as values of this step: schedules called, numbers checked."""
        values = {**self.bound, **keywords}
        for name, value in values.items():
            if name in self.ranges:
                self._check_value(name, value)
                if callable(value) and not isinstance(value, Tensor):
                    values[name] = value(state.step)
                    self._check_value(name, values[name])
        return values

    def __repr__(self) -> str:
        bound = ", ".join([f"{name}={value!r}" for name, value in self.bound.items()])
        return self.frame.format(f"{self.name}({bound})")


def as_rule(given: Any) -> Rule:
    """The Rule behind a decorated function, a `functools.partial` of one, or a Rule."""
    if isinstance(given, Rule):
        return given
    if isinstance(given, functools.partial):
        if given.args:
            raise TypeError(f"{given!r} binds positional arguments; a rule's keywords alone can be bound")
        return as_rule(given.func).bind(**given.keywords)
    if isinstance(getattr(given, "rule", None), Rule):
        made: Rule = given.rule
        return made
    shown = getattr(given, "__name__", repr(given))
    raise TypeError(
        f"{shown} is not a rule: decorate a function of your own with @bf.rule(phase=…), "
        "and call what makes rules, bf.adam() or bf.descend(lr)"
    )


def named(name: str, rule: Any) -> Rule:
    """Gives a rule another name, so that it can stand twice in a chain with memory and noise of its own.

    Args:
        name: the new name.
        rule: a rule, or a `functools.partial` of one.

    Returns:
        The rule under its new name.
    """
    return dataclasses.replace(as_rule(rule), name=name)


def flatten_inputs(params: Tree, grads: Tree, state: BioState) -> tuple[Leaves, Leaves, tuple[Any, Any]]:
    """Checked flat dicts of params and grads, and the structures that bring the trees back."""
    if not isinstance(state, BioState):
        raise TypeError(f"state is {type(state).__name__}; make a BioState with bf.init or chain.init")
    flat_params, params_structure = trees.flatten(params)
    flat_grads, grads_structure = trees.flatten(grads)
    trees.check_params(flat_params)
    trees.check_like("grads", flat_grads, flat_params)
    for path, rate in state.plasticity.items():
        if path not in flat_params:
            raise KeyError(f"state holds a synapse '{path}' that params lacks; was it made for another model?")
        if rate.dim() and rate.shape != flat_params[path].shape:
            raise ValueError(
                f"state.plasticity leaf '{path}' has shape {tuple(rate.shape)}, the parameter "
                f"{tuple(flat_params[path].shape)}; was the state made for another model?"
            )
    return flat_params, {path: flat_grads[path] for path in flat_params}, (params_structure, grads_structure)


def compute_dtype(leaf: Tensor) -> torch.dtype:
    """float32 for half precision, else the leaf's own dtype."""
    return torch.float32 if leaf.dtype in (torch.bfloat16, torch.float16) else leaf.dtype
