"""What a rule is.

A rule is a function `rule(params, grads, state, *, hyperparameters, signals) -> (params, grads, state)` with the facts
that a chain needs to order it, to key its noise and to make its state. The decorator `rule` makes rules of formulas;
`every`, `where` and `named` make rules of rules.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from biofunc.keys import fold_in
from biofunc.ranges import Interval, check_choice, check_number
from biofunc.running import Flat, on_trees
from biofunc.selection import Selection, select_paths
from biofunc.state import BioState
from biofunc.trees import Leaves, Tree

__all__ = ["Hyperparameter", "Rule", "named"]

Hyperparameter: TypeAlias = Any
"""What a caller gives: a number, a 0-d tensor (it can be vmapped and differentiated), or a function of the step. What
a rule's body sees: the number or the tensor."""

Phase = Literal["gradient", "direction", "optimizer", "descend", "weights"]

INJECTED = ("noise", "name", "redraws")
"""Keywords that biofunc fills in; callers never give them."""


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Rule:
    """A rule with the facts that a chain needs; made by the decorator `rule`, by `every`, `where` and `named`.

    Attributes:
        name: the name under which noise is keyed and memory is kept.
        phase: where it may stand: "gradient" before the optimizer, "direction" before `descend`, "optimizer",
            "descend", or "weights" after it.
        transform: `(rule, params, grads, state, keywords) -> (params, grads, state)` on flat dicts.
        initialise: `(rule, params, state, redraws) -> state` on flat dicts, or None when it keeps nothing.
        keywords: names of its keywords, injected ones included.
        at_init: those of them that its init declares; they cannot be given at a step.
        needs: signals without which it cannot run.
        ranges: the range of each numeric keyword.
        choices: the values that a keyword may have.
        checks: what raises when a value of another kind that a keyword cannot have is bound.
        redraws: it puts new synapses in the place of old ones.
        writes_rates: it changes `state.plasticity`.
        applies_rates: it multiplies the descent direction by `state.plasticity`.
        scale_free: an optimizer that divides constant factors of its gradient out again.
        every_leaf: it acts on every leaf, not on synapses alone.
        once: it acts once, before learning, and stands in no chain that moves parameters.
        fresh: fresh value of each entry of its slot, for re-drawn synapses.
        bound: values bound to keywords.
        within: selections to which it is restricted.
        wrappers: what wraps it, for its repr.
    """

    name: str
    phase: Phase
    transform: Callable[["Rule", Leaves, Leaves, BioState, dict[str, Any]], Flat]
    initialise: Callable[["Rule", Leaves, BioState, bool], BioState] | None
    keywords: tuple[str, ...]
    at_init: tuple[str, ...]
    needs: tuple[str, ...]
    ranges: Mapping[str, Interval]
    choices: Mapping[str, tuple[Any, ...]]
    checks: Mapping[str, Callable[[str, Any], None]]
    redraws: bool
    writes_rates: bool
    applies_rates: bool
    scale_free: bool
    every_leaf: bool
    once: bool
    fresh: Mapping[str, float]
    bound: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    within: tuple[Selection, ...] = ()
    wrappers: tuple[str, ...] = ()

    @property
    def accepts(self) -> tuple[str, ...]:
        """Names of the keywords that a caller may give or bind."""
        return tuple([name for name in self.keywords if name not in INJECTED])

    @property
    def draws(self) -> bool:
        """Whether it uses noise at a step."""
        return "noise" in self.keywords

    def __call__(self, params: Tree, grads: Tree, state: BioState, **keywords: Any) -> tuple[Tree, Tree, BioState]:
        """Applies the rule once, by itself.

        Args:
            params: tree of parameters.
            grads: tree of descent directions, like params.
            state: made by `init` with this rule.
            keywords: hyperparameters and signals.

        Returns:
            New params, grads and state. The state's step stays, so that schedules and periods stand still; its key
            moves on if the rule draws.

        Raises:
            TypeError, ValueError, KeyError: as the message says; nothing is changed then.
        """
        params, grads, state = on_trees([self], params, grads, state, keywords)
        return params, grads, state.replace(key=fold_in(state.key, 0)) if self.draws else state

    def acts_on(self, params: Leaves, synapses: Mapping[str, Any]) -> list[str]:
        """Paths of the leaves that the rule sees, in the order of the tree.

        Args:
            params: parameters by path.
            synapses: by path, what is a synapse: a state's `plasticity`.

        Returns:
            The paths.

        Raises:
            KeyError, TypeError, ValueError: a selection of `where` does not fit the parameters.
        """
        paths = [path for path in params if self.every_leaf or path in synapses]
        for selection in self.within:
            chosen = set(select_paths(selection, params))
            paths = [path for path in paths if path in chosen]
        return paths

    def bind(self, **keywords: Any) -> "Rule":
        """A copy with values bound to keywords; they reach the rule's init too.

        Args:
            keywords: values by keyword.

        Returns:
            The new rule; this one stays as it is.

        Raises:
            TypeError, ValueError: a keyword that the rule does not have, or a value out of its range.
        """
        for name, value in keywords.items():
            self.check_keyword(name, at_step=False)
            self.check_value(name, value)
            if name in self.checks:
                self.checks[name](self.name, value)
        return dataclasses.replace(self, bound={**self.bound, **keywords})

    def resolve(self, keywords: Mapping[str, Any], state: BioState) -> dict[str, Any]:
        """Bound and given keywords as values of this step: schedules called, numbers checked.

        Args:
            keywords: what is given at the step; it overrides what is bound.
            state: its step is that of the schedules.

        Returns:
            Values by keyword.

        Raises:
            TypeError, ValueError: a value out of its range.
        """
        values = {**self.bound, **keywords}
        for name, value in values.items():
            self.check_value(name, value)
            if name in self.ranges and callable(value) and not isinstance(value, Tensor):
                values[name] = value(state.step)
                self.check_value(name, values[name])
        return values

    def check_keyword(self, name: str, *, at_step: bool) -> None:
        """Refuses a keyword that the rule does not take, here and now.

        Args:
            name: the keyword.
            at_step: whether it is given at a step; what acts at init is refused then.

        Raises:
            TypeError: the rule does not take it.
        """
        if name not in self.accepts:
            close = difflib.get_close_matches(name, self.accepts, 1)
            hint = f"did you mean '{close[0]}'?" if close else f"it takes: {', '.join(self.accepts) or 'none'}"
            raise TypeError(f"{self.name} takes no keyword '{name}'; {hint}")
        if at_step and name in self.at_init:
            raise TypeError(
                f"{self.name}: {name} acts at init and cannot be given at a step; bind it before, "
                f"functools.partial({self.name}, {name}=…), in bf.chain(…) or in bf.init(params, key, …)"
            )

    def check_needs(self, signals: Mapping[str, Any], hand_over: str = "learn(params, grads, state, {0}={0})") -> None:
        """Refuses to run without a signal that is neither bound nor handed over.

        Args:
            signals: what is handed over, by name.
            hand_over: how it is done, for the message; "{0}" stands for the name.

        Raises:
            TypeError: a signal is missing.
        """
        for name in self.needs:
            if name not in self.bound and name not in signals:
                how = f"{hand_over.format(name)}" + ("; bf.record_activity(model) records it" * (name == "activity"))
                raise TypeError(f"{self.name}: {name} is missing; hand it over at each step, {how}")

    def check_value(self, name: str, value: Any) -> None:
        """Refuses a value that a keyword cannot have; of a tensor the shape alone is looked at.

        Args:
            name: the keyword.
            value: a number, tensor, schedule or choice.

        Raises:
            TypeError: it is none of what the keyword takes.
            ValueError: it is out of range, no choice, or a tensor that is not 0-d.
        """
        if name in self.choices:
            check_choice(self.name, name, value, self.choices[name])
        if name in self.ranges:
            check_number(self.name, name, value, self.ranges[name], at_init=name in self.at_init)

    def __repr__(self) -> str:
        bound = ", ".join([f"{name}={value!r}" for name, value in self.bound.items()])
        return "".join(self.wrappers) + f"{self.name}({bound})" + ")" * len(self.wrappers)


def as_rule(given: Any) -> Rule:
    """The Rule behind a decorated function, a `functools.partial` of one, or a Rule.

    Args:
        given: what a caller takes for a rule.

    Returns:
        The Rule, keywords of a partial bound.

    Raises:
        TypeError: it is not a rule, or a partial binds positional arguments.
        TypeError, ValueError: a keyword that a partial binds, as for `Rule.bind`.
    """
    if isinstance(given, Rule):
        return given
    if isinstance(given, functools.partial):
        if given.args:
            raise TypeError(f"{given!r} binds positional arguments; a rule's keywords alone can be bound")
        return as_rule(given.func).bind(**given.keywords)
    if isinstance(getattr(given, "rule", None), Rule):
        made: Rule = given.rule
        return made
    owner = torch.optim.Optimizer | torch.nn.Module  # what their repr says takes lines
    shown = getattr(given, "__name__", type(given).__name__ if isinstance(given, owner) else str(given))
    maker = {"SGD": "sgd", "Adam": "adam", "AdamW": "adamw"}.get(shown, shown)
    if isinstance(given, list | tuple):
        hint = "hand rules over one by one, bf.chain(*rules)"
    elif hasattr(given, "rules"):
        hint = "a chain makes its state with its own init and stands by itself or inside another chain"
    elif maker in ("sgd", "adam", "adamw", "descend"):
        hint = f"call bf.{maker} to make one, bf.{maker}(…)"
    else:
        hint = "decorate a function of your own with @bf.rule(phase=…)"
    raise TypeError(f"{shown} is not a rule; {hint}")


def named(name: str, rule: Any) -> Rule:
    """Gives a rule another name, so that it can stand twice in a chain with memory and noise of its own.

    Args:
        name: the new name.
        rule: a rule, or a `functools.partial` of one.

    Returns:
        The rule under its new name.

    Raises:
        TypeError: `rule` is not a rule, or `name` no name.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name is {name!r}; give a name, bf.named('another name', rule)")
    return dataclasses.replace(as_rule(rule), name=name)


def compute_dtype(leaf: Tensor) -> torch.dtype:
    """float32 for half precision, else the leaf's own dtype."""
    return torch.float32 if leaf.dtype in (torch.bfloat16, torch.float16) else leaf.dtype
