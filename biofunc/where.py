"""Rules that act on some synapses only."""

import dataclasses
from typing import Any

from biofunc.rule import Flat, Rule, as_rule
from biofunc.selection import Selection, prepared, select_paths
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["where"]


def where(selection: Selection, rule: Any) -> Rule:
    """Restricts a rule to some of the leaves that it would act on.

    Args:
        selection: a glob on paths, a predicate `(path, leaf) -> bool`, a tree of bools like the parameters, or
            `layers(model, *types)`.
        rule: a rule, or a `functools.partial` of one; its name, phase and keywords stay.

    Returns:
        The restricted rule. Other leaves pass through as the same objects, and it keeps no memory for them.

    Raises:
        TypeError: `rule` is not a rule.
        ValueError: at init, when the selection is empty.
    """
    inner = as_rule(rule)
    selection = prepared(selection)

    def transform(self: Rule, params: Leaves, grads: Leaves, state: BioState, keywords: dict[str, Any]) -> Flat:
        chosen = select_paths(selection, params)
        some_params, some_grads, state = inner.transform(
            self, {path: params[path] for path in chosen}, {path: grads[path] for path in chosen}, state, keywords
        )
        return {**params, **some_params}, {**grads, **some_grads}, state

    def initialise(self: Rule, params: Leaves, state: BioState, redraws: bool) -> BioState:
        chosen = select_paths(selection, params)
        if not self.every_leaf and not any(path in state.plasticity for path in chosen):
            raise ValueError(f"{self.name}: where selects no synapse, only {', '.join(chosen)}")
        if inner.initialise is None:
            return state.with_slot(self.name)
        return inner.initialise(self, {path: params[path] for path in chosen}, state, redraws)

    shown = repr(selection) if isinstance(selection, str) else getattr(selection, "__name__", "mask")
    frame = f"where({shown}, {inner.frame})"
    return dataclasses.replace(inner, transform=transform, initialise=initialise, frame=frame)
