"""Hyperparameters that change with the step.

A schedule is any function of the 0-d step tensor; these are the common ones. They compute in float64 and the rule
casts the value, so that a schedule costs no precision and no recompilation. Their values may be 0-d tensors, to sweep
over them with `vmap`. The step is that of a chain; a rule called alone does not advance it.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["constant", "cosine", "exponential", "linear", "piecewise"]

Schedule = Callable[[Tensor | int], Tensor]
"""Of the step as a 0-d tensor; those of this file take an int too, to look at or to plot."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class _Schedule:
    """A formula with its arguments; a class, so that it can be pickled, printed and compared."""

    name: str
    formula: Callable[..., Tensor]
    arguments: tuple[Any, ...]

    def __call__(self, step: Tensor | int) -> Tensor:
        return self.formula(*self.arguments, step)

    def __repr__(self) -> str:
        return f"schedules.{self.name}({', '.join(map(repr, self.arguments))})"


def constant(value: float | Tensor) -> Schedule:
    """The same value at every step.

    Args:
        value: the value; inf where the hyperparameter takes it.

    Returns:
        `step -> value`.

    Raises:
        ValueError: the value is NaN or -inf.
        TypeError: it is no number or tensor.
    """
    _check_value("value", value)
    return _Schedule("constant", _constant, (value,))


def _constant(value: float | Tensor, step: Tensor | int) -> Tensor:
    return value + 0 * _exact(step)


def linear(start: float | Tensor, stop: float | Tensor, steps: int) -> Schedule:
    """A straight line from `start` at step 0 to `stop` at step `steps`, constant afterwards.

    Args:
        start: value at step 0.
        stop: value from step `steps` on.
        steps: length of the line, at least 1.

    Returns:
        `step -> start + (stop - start) min(step / steps, 1)`.

    Raises:
        ValueError: `steps` is below 1, or a value is not finite.
        TypeError: a value is no number or tensor, or `steps` no integer.
    """
    _check_steps(steps)
    _check_finite(start=start, stop=stop)
    return _Schedule("linear", _linear, (start, stop, steps))


def _linear(start: float | Tensor, stop: float | Tensor, steps: int, step: Tensor | int) -> Tensor:
    return start + (stop - start) * _progress(step, steps)


def cosine(start: float | Tensor, stop: float | Tensor, steps: int) -> Schedule:
    """Half a cosine from `start` at step 0 to `stop` at step `steps`, constant afterwards.

    Args:
        start: value at step 0.
        stop: value from step `steps` on.
        steps: length of the half wave, at least 1.

    Returns:
        `step -> stop + (start - stop) (1 + cos(pi min(step / steps, 1))) / 2`.

    Raises:
        ValueError: `steps` is below 1, or a value is not finite.
        TypeError: a value is no number or tensor, or `steps` no integer.
    """
    _check_steps(steps)
    _check_finite(start=start, stop=stop)
    return _Schedule("cosine", _cosine, (start, stop, steps))


def _cosine(start: float | Tensor, stop: float | Tensor, steps: int, step: Tensor | int) -> Tensor:
    return stop + (start - stop) * (1 + torch.cos(math.pi * _progress(step, steps))) / 2


def exponential(start: float | Tensor, factor: float | Tensor, steps: int) -> Schedule:
    """A geometric course that is multiplied by `factor` over every `steps` steps.

    Args:
        start: value at step 0.
        factor: > 0.
        steps: steps per factor, at least 1.

    Returns:
        `step -> start factor^(step / steps)`.

    Raises:
        ValueError: `steps` is below 1, a value is not finite, or `factor` not positive.
        TypeError: a value is no number or tensor, or `steps` no integer.
    """
    _check_steps(steps)
    _check_number("factor", factor)
    if not isinstance(factor, Tensor) and not factor > 0:
        raise ValueError(f"factor is {factor}; it must be positive")
    _check_finite(start=start, factor=factor)
    return _Schedule("exponential", _exponential, (start, factor, steps))


def _exponential(start: float | Tensor, factor: float | Tensor, steps: int, step: Tensor | int) -> Tensor:
    return start * factor ** (_exact(step) / steps)


def piecewise(start: float | Tensor, values: Mapping[int, float | Tensor]) -> Schedule:
    """Steps: `start`, then from each named step on the value given for it.

    Args:
        start: value at step 0.
        values: new value by the step at which it begins, `{1000: 0.01, 2000: 0.001}`; inf where the hyperparameter
            takes it.

    Returns:
        `step -> the value of the last step named that is not later, else start`.

    Raises:
        ValueError: a step is below 1 or beyond 2^63, or a value is NaN or -inf.
        TypeError: values is no dict, a step no integer, or a value no number or tensor.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"values is {type(values).__name__}; give a dict of values by step, {{1000: 0.01}}")
    for step in values:
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"values names step {step!r}; steps are integers")
        if step < 1:
            raise ValueError(f"values names step {step}; the value of step 0 is start, named steps begin at 1")
        if step >= 2**63:
            raise ValueError(f"values names step {step}; steps are counted up to 2^63")
    for name, value in {"start": start, **{f"values[{step}]": value for step, value in values.items()}}.items():
        _check_value(name, value)
    return _Schedule("piecewise", _piecewise, (start, dict(sorted(values.items()))))


def _piecewise(start: float | Tensor, values: Mapping[int, float | Tensor], step: Tensor | int) -> Tensor:
    value = _constant(start, step)
    count = step if isinstance(step, Tensor) else torch.tensor(step)  # float64 would blur steps beyond 2^53
    for begin, new in values.items():
        value = torch.where(count >= begin, new, value)
    return value


def _progress(step: Tensor | int, steps: int) -> Tensor:
    return (_exact(step) / steps).clamp(max=1.0)


def _exact(step: Tensor | int) -> Tensor:
    return step.to(torch.float64) if isinstance(step, Tensor) else torch.tensor(step, dtype=torch.float64)


def _check_value(name: str, value: float | Tensor) -> None:
    _check_number(name, value)
    if not isinstance(value, Tensor) and not value > -math.inf:
        raise ValueError(f"{name} is {value}; it must be a number or inf")


def _check_finite(**values: float | Tensor) -> None:
    for name, number in values.items():
        _check_number(name, number)
        if not isinstance(number, Tensor) and not math.isfinite(number):
            raise ValueError(f"{name} is {number}; it must be finite")


def _check_number(name: str, number: float | Tensor) -> None:
    if isinstance(number, bool) or not isinstance(number, numbers.Real | Tensor):
        raise TypeError(f"{name} is {number!r}; it must be a number or a 0-d tensor")


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps is {steps!r}; a number of steps is an integer")
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
