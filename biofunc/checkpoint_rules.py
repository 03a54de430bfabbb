"""Rules in a checkpoint: a run goes on with those that it began with, or is told in what they differ.

No rule is made out of a file, so that what is kept of one need only tell it from others: numbers by value, tensors by a
digest of their bits, functions by name, with what a `functools.partial` of them binds. Each value has a text beside it,
for messages.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import math
import numbers
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from biofunc import checkpoint_file, sharding
from biofunc.attachment import Attachment
from biofunc.chain import Chain
from biofunc.checkpoint_layout import DTYPES, check_tensor, name_of
from biofunc.rule import as_rule
from biofunc.selection import ByPath, Mask, Selection

Row = dict[str, Any]
Rules = Chain | Attachment | Sequence[Any]
NOT_GIVEN = [{"not": "given"}, "not given"]
LONGEST_TEXT = 120


def describe_rules(rules: Rules | None) -> list[Row] | None:
    """What a checkpoint keeps of rules.

    Args:
        rules: the chain, the attachment or the rules, or None.

    Returns:
        A row for each rule, which `json.dumps` takes.

    Raises:
        TypeError: one of them is no rule.
    """
    if rules is None:
        return None
    given = rules
    if isinstance(rules, Chain):
        given = rules.rules
    elif isinstance(rules, Attachment):
        given = [rule for group in rules.rules.values() for rule in group]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"rules is {type(rules).__name__}; give a chain, what bf.attach returned, or a list of rules")
    return [
        {
            "name": rule.name,
            "around": list(rule.wrappers),
            "within": [_entry(_selected(selection)) for selection in rule.within],
            "bound": {keyword: _entry(value) for keyword, value in rule.bound.items()},
        }
        for rule in map(as_rule, given)
    ]


def parse_rules(text: str) -> list[Row] | None:
    """Rows out of a file that nobody vouches for.

    Args:
        text: the JSON.

    Returns:
        What `describe_rules` gave.

    Raises:
        ValueError: it is something else.
    """
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its rules are damaged") from None
    for row in [] if rows is None else rows if isinstance(rows, list) else [rows]:
        match row:
            case {"name": str(), "around": list(around), "within": list(within), "bound": dict(bound)}:
                if _are_texts(around) and all([_is_entry(entry) for entry in (*within, *bound.values())]):
                    continue
        raise ValueError("its rules are damaged")
    parsed: list[Row] | None = rows
    return parsed


def _are_texts(values: list[Any]) -> bool:
    return all([type(value) is str for value in values])


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)


def check_rules(saved: list[Row] | None, rules: Rules) -> None:
    """Refuses to go on with other rules than those that were saved.

    Args:
        saved: those of the checkpoint, parsed.
        rules: the chain or the rules.

    Raises:
        ValueError: they differ; the message says in what.
        TypeError: one of them is no rule.
    """
    given = json.loads(json.dumps(describe_rules(rules)))
    go_on = "bf.load(path) without rules= goes on with others"
    if saved is None:
        raise ValueError("the checkpoint was saved without rules; " + go_on)
    names = [[rule["name"] for rule in some] for some in (saved, given)]
    if names[0] != names[1]:
        raise ValueError(f"the checkpoint was made by the rules {names[0]}, given are {names[1]}; {go_on}")
    for old, new in zip(saved, given, strict=True):
        if old["around"] != new["around"]:
            raise ValueError(
                f"{old['name']}: the checkpoint has it inside {_wrapped(old['around'])}, here it is inside "
                f"{_wrapped(new['around'])}; {go_on}"
            )
        if [kept for kept, _ in old["within"]] != [kept for kept, _ in new["within"]]:
            raise ValueError(f"{old['name']}: where selects {_difference(old['within'], new['within'])}; {go_on}")
        for keyword in {**old["bound"], **new["bound"]}:
            before, now = [some["bound"].get(keyword, NOT_GIVEN) for some in (old, new)]
            if before[0] != now[0]:
                raise ValueError(f"{old['name']}: {keyword} is {_difference([before], [now])}; {go_on}")


def _wrapped(around: list[str]) -> str:
    return "".join(around) + "…" + ")" * len(around) if around else "nothing"


def _difference(saved: list[Any], given: list[Any]) -> str:
    """Texts of what differs, or, of two selections by name, the first leaf that one of them has alone."""
    pairs = [pair for pair in zip(saved, given, strict=False) if pair[0][0] != pair[1][0]] or [(saved[0], given[0])]
    (old, shown), (new, shown_here) = pairs[0]
    if isinstance(old, list) and isinstance(new, list) and _are_texts([*old, *new]):
        for path in sorted(set(old) ^ set(new)):
            return f"'{path}' {'in the checkpoint alone' if path in old else 'here alone'}"
    same = " with another content" if shown == shown_here else ""
    return f"{shown} in the checkpoint and {shown_here}{same} here"


def _selected(selection: Selection) -> Any:
    """A mask and layers by the leaves that they select, a glob as it is, a predicate of the user's own by its name."""
    if isinstance(selection, Mask):
        return sorted([path for path, flag in selection.flags.items() if flag])
    return sorted(selection.names) if isinstance(selection, ByPath) else selection


def _entry(value: Any) -> list[Any]:
    return [_kept(value, ()), _text(value)]


def _kept(value: Any, above: tuple[int, ...]) -> Any:
    """What tells a value from others, as `json.dumps` takes it; above: what it lies in."""
    if id(value) in above:
        return {"again": above.index(id(value))}
    try:
        return _content(value, above)
    except Exception:  # whatever an object of the user's does when it is looked at, the run is saved
        return {"object": name_of(type(value))}


def _content(value: Any, above: tuple[int, ...]) -> Any:
    def each(values: Any) -> list[Any]:
        return [_kept(child, (*above, id(value))) for child in values]

    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value) if -(2**63) <= int(value) < 2**64 else {"integer": hex(value)}
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else {"number": repr(float(value))}
    if isinstance(value, Tensor):
        whole = sharding.whole(value.detach())
        check_tensor(whole, "")
        digest = hashlib.sha256(checkpoint_file.bytes_of(whole)).hexdigest()
        return {"tensor": DTYPES[whole.dtype], "shape": list(whole.shape), "sha256": digest}
    if type(value).__module__ == "numpy" and not value.dtype.hasobject:
        digest = hashlib.sha256(value.tobytes()).hexdigest()
        return {"array": str(value.dtype), "shape": list(value.shape), "sha256": digest}
    if isinstance(value, Mapping):
        return {"mapping": sorted([each(item) for item in value.items()], key=json.dumps)}
    if isinstance(value, list | tuple):
        return each(value)
    if isinstance(value, set | frozenset):
        return {"set": sorted(each(value), key=json.dumps)}
    if isinstance(value, functools.partial):
        return {"function": name_of(value.func), "binds": each([value.func, list(value.args), value.keywords])}
    if isinstance(value, types.MethodType):
        return {"function": name_of(value), "binds": each([value.__self__])}
    if isinstance(value, bytes | complex | range | slice | enum.Enum | torch.dtype | torch.device):
        return {"repr": repr(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
        return {"object": name_of(value), "holds": [fields, each([getattr(value, name) for name in fields])]}
    return {"object": name_of(value)}


def _text(value: Any) -> str:
    """How messages show a value, in few words."""
    try:
        text = _shown(value)
    except Exception:  # as above
        text = name_of(type(value))
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        one = value.numel() == 1 and not value.is_meta
        return repr(sharding.whole(value.detach()).item()) if one else f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, functools.partial):
        keywords = [f"{keyword}={_text(child)}" for keyword, child in value.keywords.items()]
        return f"{_text(value.func)}({', '.join([*map(_text, value.args), *keywords])})"
    return name_of(value) if hasattr(value, "__qualname__") else repr(value)
