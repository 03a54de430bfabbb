"""Axes of matplotlib: made or checked, and straight around 0 where asked for; without matplotlib, what to install."""

import math
from typing import Any

import torch
from torch import Tensor

try:
    import numpy
    from matplotlib.axes import Axes
except ModuleNotFoundError:
    raise ModuleNotFoundError(
        "biofunc.plot needs matplotlib, which is not installed: pip install '.[plot]' in the checkout",
        name="matplotlib",
    ) from None

# What draws takes numpy and Axes from here: where they are missing, the line above comes first
__all__ = ["Axes", "axes_of", "check_symlog", "numbers_of", "numpy", "set_symlog"]


def axes_of(ax: Axes | None) -> Axes:
    """The axes to draw on, without a frame on top and at the right.

    Args:
        ax: axes of matplotlib; None makes new ones.

    Returns:
        The axes.

    Raises:
        TypeError: `ax` is no axes.
    """
    if ax is None:
        from matplotlib import pyplot

        ax = pyplot.subplots(layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax is {type(ax).__name__}; give axes of matplotlib, pyplot.subplots()[1]")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def check_symlog(straight: float | None) -> None:
    """Refuses a half-width of the straight part that is not positive.

    Args:
        straight: half-width around 0; None for an axis that is straight all along.

    Raises:
        ValueError: it is not positive.
    """
    if straight is not None and not straight > 0:
        raise ValueError(f"symlog is {straight}; it must be positive")


def set_symlog(ax: Axes, which: str, straight: float) -> None:
    """Makes an axis straight around 0 and logarithmic beyond, with ticks that read as plain numbers.

    Args:
        ax: axes on which all is drawn: the ticks are those within its limits.
        which: "x" or "y".
        straight: half-width around 0 of the straight part, positive.
    """
    low, high = ax.get_xlim() if which == "x" else ax.get_ylim()
    decades = math.ceil(math.log10(max(abs(low), abs(high), straight) / straight)) + 1
    digits = (1, 2, 5) if which == "y" and decades <= 3 else (1,)  # numbers side by side need more room
    sizes = [0.5 * straight, *[digit * straight * 10**decade for decade in range(decades) for digit in digits]]
    ticks = [tick for tick in (*[-size for size in sizes[::-1]], 0, *sizes) if low <= tick <= high]
    if which == "x":
        ax.set_xscale("symlog", linthresh=straight)
    else:
        ax.set_yscale("symlog", linthresh=straight)
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_ticks(ticks)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter("{x:g}")


def numbers_of(values: Any) -> Any:
    """As an array of float64.

    Args:
        values: a tensor on any device, or what numpy makes an array of.

    Returns:
        An array on the CPU.
    """
    if isinstance(values, Tensor):
        return values.detach().to("cpu", torch.float64).numpy()
    return numpy.asarray(values, dtype=numpy.float64)
