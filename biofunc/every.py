"""Rules that act at some steps only: synapses turn over by the day, not by the millisecond."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from biofunc.rule import Rule, as_rule
from biofunc.running import Flat
from biofunc.state import DATA, BioState
from biofunc.trees import Leaves

__all__ = ["every"]


def every(n: int, rule: Any) -> Rule:
    """Lets a rule act at every n-th step: when (step + 1) % n == 0.

    Called eagerly on the CPU with a step that is not batched, a skipped step costs nothing. When compiling, in an
    ensemble under `vmap` and on other devices the rule is computed at each step and selected with `torch.where`:
    skipped steps then cost as much. The step is that of a chain; a rule called alone does not advance it.

    Args:
        n: period in steps, at least 1; 1 acts at every step.
        rule: a rule, or a `functools.partial` of one; its name, phase and keywords stay.

    Returns:
        The rule with its period.

    Raises:
        TypeError: `n` is not an integer, or `rule` is not a rule.
        ValueError: `n` is below 1 or beyond 2^63, or the rule is an optimizer.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n is {n!r}; a period is an integer number of steps: bf.every(100, rule)")
    if n < 1:
        raise ValueError(f"n is {n}; a period is at least 1 step")
    if n >= 2**63:
        raise ValueError(f"n is {n}; steps are counted up to 2^63")
    inner = as_rule(rule)
    if inner.phase == "optimizer" and n > 1:
        raise ValueError(
            f"every({n}, {inner.name}) would hand raw gradients on in between; an optimizer acts at every step"
        )

    return dataclasses.replace(
        inner, transform=_Periodic(n, inner.transform), wrappers=(f"every({n}, ", *inner.wrappers)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Periodic:
    """What a rule does at every n-th step; a class, so that it can be pickled."""

    n: int
    inner: Callable[..., Flat]

    def __call__(self, rule: Rule, params: Leaves, grads: Leaves, state: BioState, keywords: dict[str, Any]) -> Flat:
        fires = (state.step + 1) % self.n == 0
        known = _value_if_known(fires)
        if known is None:
            new = self.inner(rule, params, grads, state, keywords)
            fields = {name: _select_leaves(fires, getattr(new[2], name), getattr(state, name)) for name in DATA}
            return _select_leaves(fires, new[0], params), _select_leaves(fires, new[1], grads), state.replace(**fields)
        return self.inner(rule, params, grads, state, keywords) if known else (params, grads, state)


def _select_leaves(fires: Tensor, new: Any, old: Any) -> Any:
    """New where the rule fires, else old, through nested dicts; what the rule left alone is passed on as it is."""
    if isinstance(new, dict):
        return {name: _select_leaves(fires, leaf, old[name]) for name, leaf in new.items()}
    return old if new is old else torch.where(fires, new, old)


def _value_if_known(flag: Tensor) -> bool | None:
    """The flag's value where reading it is free: eagerly, on the CPU, outside vmap."""
    if torch.compiler.is_compiling() or flag.device.type != "cpu":
        return None
    try:
        return bool(flag)
    except RuntimeError:  # vmap refuses to read one member's value
        return None
