"""What a hyperparameter may be: a number of a range, a 0-d tensor, a schedule; or one of several choices."""

import dataclasses
import numbers
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range of numbers; optional: None is allowed too and stands for "not used"."""

    text: str
    low: float
    high: float
    optional: bool = False

    @classmethod
    def parse(cls, text: str, *, optional: bool = False) -> "Interval":
        """From interval notation, "[0, 1)"."""
        try:
            low, high = [float(bound) for bound in text[1:-1].split(",")]
        except ValueError:
            low, high = 0.0, 0.0
        if text[:1] not in ("[", "(") or text[-1:] not in ("]", ")") or not low < high:
            raise ValueError(f"range '{text}' is not in interval notation; write '[0, 1)'")
        return cls(text, low, high, optional)

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.text[0] == "[" else value > self.low
        return above and (value <= self.high if self.text[-1] == "]" else value < self.high)


def check_number(rule: str, name: str, value: Any, interval: Interval, *, at_init: bool) -> None:
    """Refuses what a numeric keyword cannot have; of a tensor, shape and dtype alone are looked at.

    Args:
        rule: the rule's name.
        name: the keyword.
        value: a number, tensor or schedule; None if the range is optional.
        interval: its range.
        at_init: whether the keyword acts at init, where no schedule can be called.

    Raises:
        TypeError: it is none of what the keyword takes.
        ValueError: it is out of range, or a tensor that is not 0-d.
    """
    if value is None and interval.optional:
        return
    if isinstance(value, Tensor):
        if value.dim():
            raise ValueError(
                f"{rule}: {name} has shape {tuple(value.shape)}; it must be a number or a 0-d tensor: "
                "torch.vmap tries several values"
            )
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{rule}: {name} is a tensor of dtype {value.dtype}; it must be real")
    elif callable(value):
        if at_init:
            raise TypeError(f"{rule}: {name} acts at init and takes no schedule; give a number or a tensor")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        expected = "a number or a 0-d tensor" + ("" if at_init else ", or a schedule")
        raise TypeError(f"{rule}: {name} is {value!r}; it must be {expected}")
    elif float(value) not in interval:
        raise ValueError(f"{rule}: {name} is {value}; it must lie in {interval.text}")


def check_choice(rule: str, name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuses a value that is none of the choices.

    Args:
        rule: the rule's name.
        name: the keyword.
        value: what was given.
        choices: what it may be.

    Raises:
        ValueError: it is no choice.
    """
    # Of one type: 1 == True, and a tensor has no single truth
    if not any([isinstance(value, type(choice)) and value == choice for choice in choices]):
        raise ValueError(f"{rule}: {name} is {value!r}; it must be {' or '.join(map(repr, choices))}")
