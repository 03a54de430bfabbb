"""Rules in a checkpoint: a run goes on with those that it began with, or is told in what they differ."""

from collections.abc import Sequence
from typing import Any

import torch

from biofunc.chain import Chain
from biofunc.checkpoint_layout import Description, Reference, Saved, describe, parse
from biofunc.checkpoint_like import ABSENT
from biofunc.rule import as_rule
from biofunc.selection import ByPath, Mask, Selection
from biofunc.trees import Leaves


def describe_rules(rules: Chain | Sequence[Any] | None, tensors: Leaves) -> Description:
    """The layout of rules, as `checkpoint_layout.describe` gives that of a tree.

    Args:
        rules: the chain or the rules, or None.
        tensors: takes up the tensors among hyperparameters by name.

    Returns:
        What `json.dumps` takes.

    Raises:
        TypeError: one of them is no rule.
    """
    if rules is None:
        return None
    given = rules.rules if isinstance(rules, Chain) else rules
    made = [as_rule(rule) for rule in given]
    rows = [
        {
            "name": rule.name,
            "around": list(rule.wrappers),
            "within": [_selected(selection) for selection in rule.within],
            "bound": dict(rule.bound),
        }
        for rule in made
    ]
    return describe(rows, "rules", tensors, references=True)


def _selected(selection: Selection) -> Any:
    """A mask by its flags, layers by their names, a glob as it is, a predicate of the user's own by its name."""
    if isinstance(selection, Mask):
        return selection.flags
    return sorted(selection.names) if isinstance(selection, ByPath) else selection


def check_rules(saved: Any, rules: Chain | Sequence[Any]) -> None:
    """Refuses to go on with other rules than those that were saved.

    Args:
        saved: those of the checkpoint, parsed.
        rules: the chain or the rules.

    Raises:
        ValueError: they differ; the message says in what.
    """
    tensors: Leaves = {}
    given = parse(describe_rules(rules, tensors), tensors, "rules", set(), references=True)
    go_on = "bf.load(path) without rules= goes on with others"
    if saved is None:
        raise ValueError("the checkpoint was saved without rules; " + go_on)
    names = [[rule["name"] for rule in some] for some in (saved, given)]
    if names[0] != names[1]:
        raise ValueError(f"the checkpoint was made by the rules {names[0]}, given are {names[1]}; {go_on}")
    for old, new in zip(saved, given, strict=True):
        if old["around"] != new["around"]:
            raise ValueError(
                f"{old['name']}: the checkpoint has it inside {''.join(old['around']) or 'nothing'}, here it is inside "
                f"{''.join(new['around']) or 'nothing'}; {go_on}"
            )
        if _bits(old["within"]) != _bits(new["within"]):
            raise ValueError(
                f"{old['name']}: where selects by {old['within']} in the checkpoint and by {new['within']} here; "
                f"{go_on}"
            )
        for keyword in {**old["bound"], **new["bound"]}:
            pair = [some["bound"].get(keyword, ABSENT) for some in (old, new)]
            if _bits(pair[0]) != _bits(pair[1]):
                shown = ["not given" if value is ABSENT else repr(value) for value in pair]
                raise ValueError(
                    f"{old['name']}: {keyword} is {shown[0]} in the checkpoint and {shown[1]} here; {go_on}"
                )


def _bits(value: Any) -> Any:
    """Something that is equal for equal hyperparameters alone: tensors by dtype, shape and bits, numbers by value."""
    if isinstance(value, Saved):
        flat = value.tensor.detach().cpu().contiguous().reshape(-1)
        return str(flat.dtype), tuple(value.tensor.shape), tuple(flat.view(torch.uint8).tolist())
    if isinstance(value, Reference):
        return value.name, _bits(value.arguments), _bits(value.keywords)
    if isinstance(value, dict):
        return {key: _bits(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_bits(child) for child in value]
    return "nan" if value != value else value
