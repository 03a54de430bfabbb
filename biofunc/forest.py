"""The forest plot: differences with their confidence intervals, one under another; public as `biofunc.plot.forest`."""

import math
from collections.abc import Mapping, Sequence

from biofunc.axes import Axes, axes_of, check_symlog, numpy, set_symlog

__all__ = ["forest"]

VERDICTS = {"better": ("#009E73", "^"), "undecided": ("#666666", "o"), "worse": ("#D55E00", "v")}


def forest(
    intervals: Mapping[str, tuple[float, float, float]],
    *,
    higher_is_better: bool = True,
    symlog: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws paired differences with their confidence intervals, a row per arm, the first on top.

    A verdict shows in colour and marker: an interval above 0 is a green triangle that points up, one below 0 an orange
    triangle that points down, and one that holds 0 a grey open circle.

    Args:
        intervals: by arm, (difference, low, high); low and high NaN where there is no interval.
        higher_is_better: whether differences above 0 are gains; False for a loss.
        symlog: half-width around 0 within which the axis is straight; logarithmic beyond. Default: straight.
        ax: axes to draw on; default: new ones.

    Returns:
        The axes.

    Raises:
        ValueError: no arms, an interval that is not three numbers in order, or a `symlog` that is not positive.
        TypeError: `ax` is no axes.
    """
    if not intervals:
        raise ValueError("intervals is empty; give at least one arm")
    check_symlog(symlog)
    rows = {name: _verdict(name, interval, higher_is_better) for name, interval in intervals.items()}
    ax = axes_of(ax)
    ax.axvline(0, color="#000000", linewidth=1)
    for verdict, (colour, marker) in VERDICTS.items():
        places = [place for place, name in enumerate(rows) if rows[name] == verdict]
        if not places:
            continue
        values = numpy.array([list(intervals.values())[place] for place in places], dtype=float)
        ax.errorbar(
            values[:, 0],
            places,
            xerr=numpy.nan_to_num(numpy.stack([values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]])),
            fmt=marker,
            color=colour,
            markerfacecolor="white" if verdict == "undecided" else colour,
            markersize=6,
            linewidth=1.5,
            capsize=3,
            label=verdict,
        )
    digits = _digits(intervals)
    for place, (difference, low, high) in enumerate(intervals.values()):
        text = f"{difference:+.{digits}f}"
        if not math.isnan(low):
            text += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
        text = text.replace("-", "−")  # as on the axis
        ax.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize="small")
    ax.set_yticks(range(len(intervals)), [name.replace("_", " ") for name in intervals])
    ax.set(ylim=(len(intervals) - 0.5, -0.5), xlabel="paired difference [95 % CI]")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    if symlog is not None:
        set_symlog(ax, "x", symlog)
    return ax


def _digits(intervals: Mapping[str, tuple[float, float, float]]) -> int:
    """Decimals that leave three digits to the widest bound, two at the least: accuracies may lie in [0, 1]."""
    bounds = [abs(bound) for interval in intervals.values() for bound in interval if math.isfinite(bound)]
    largest = max(bounds, default=1.0)
    return 2 if largest >= 1 or largest == 0 else min(6, 2 - math.floor(math.log10(largest)))


def _verdict(name: str, interval: Sequence[float], higher_is_better: bool) -> str:
    if len(interval) != 3 or interval[1] > interval[0] or interval[0] > interval[2]:
        raise ValueError(
            f"intervals['{name}'] is {interval}; give (difference, low, high) in low <= difference <= high"
        )
    _, low, high = interval
    if low > 0:
        return "better" if higher_is_better else "worse"
    if high < 0:
        return "worse" if higher_is_better else "better"
    return "undecided"
