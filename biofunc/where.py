"""Rules that act on some synapses only."""

import dataclasses
from typing import Any

from biofunc.rule import Rule, as_rule
from biofunc.selection import Selection, prepared

__all__ = ["where"]


def where(selection: Selection, rule: Any) -> Rule:
    """Restricts a rule to some of the leaves that it would act on.

    Args:
        selection: a glob on paths, a predicate `(path, leaf) -> bool` of path and shape, a tree of bools like the
            parameters, or `layers(model, *types)`.
        rule: a rule, or a `functools.partial` of one; its name, phase and keywords stay. Of nested restrictions, all
            must hold.

    Returns:
        The restricted rule. Other leaves pass through as the same objects, and it keeps no memory for them.

    Raises:
        TypeError: `rule` is not a rule.
        ValueError: at init, when the selection is empty.
    """
    inner = as_rule(rule)
    shown = repr(selection) if isinstance(selection, str) else getattr(selection, "__name__", "mask")
    return dataclasses.replace(
        inner, within=(*inner.within, prepared(selection)), wrappers=(f"where({shown}, ", *inner.wrappers)
    )
