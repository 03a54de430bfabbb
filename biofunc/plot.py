"""Pictures of learning and of synapses: each function draws on axes of matplotlib, or makes them, and returns them.

The module needs the extra `plot`, `pip install '.[plot]'` in the checkout; `import biofunc` alone does not load
matplotlib. Arms differ in marker as well as in colour, so that colour-blind readers and grey prints tell them apart.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from biofunc import measure
from biofunc.axes import Axes, axes_of, check_symlog, numbers_of, numpy, set_symlog
from biofunc.forest import forest
from biofunc.measure_plasticity import RATE_EDGES
from biofunc.measured import all_weights
from biofunc.selection import Selection
from biofunc.state import BioState
from biofunc.trees import Tree

__all__ = ["COLOURS", "forest", "learning_curves", "rate_spectrum", "size_distribution", "survival_curve"]

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
"""Black, for what the others are compared with, and the colours of Okabe, Ito 2008, which colour-blind readers tell
apart, without the yellow, too light for lines."""

MARKERS = ("o", "s", "^", "D", "v", "X", "P")

Curves = Mapping[str, Any]
"""By name, a tensor or array `(members, time)`, or `(time,)` of a single run."""


def learning_curves(
    curves: Curves | Tensor,
    steps: Sequence[float] | Tensor | None = None,
    *,
    baseline: str | None = None,
    symlog: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws a line per arm: the mean over its members, with the 95 % band of the mean.

    The band is mean ± 1.96 sd / sqrt(members), the normal approximation: too narrow for fewer than some ten members.

    Args:
        curves: accuracy, loss or paired differences: a tensor or array `(members, time)`, or `(time,)`; or several by
            name.
        steps: `(time,)`, where they were taken; default: 0, 1, 2, ...
        baseline: the arm with which the others are compared, drawn as a black dotted line on top.
        symlog: half-width around 0 within which the vertical axis is straight; logarithmic beyond. Default: straight.
        ax: axes to draw on; default: new ones.

    Returns:
        The axes; what the curves are, `ax.set(ylabel=…)` says.

    Raises:
        ValueError: no curves, a shape that is not `(members, time)`, as many steps as there are not times, a baseline
            that is no arm, or a `symlog` that is not positive.
        TypeError: curves is no dict, or `ax` no axes.
    """
    named = {"": curves} if isinstance(curves, Tensor | numpy.ndarray) else curves
    if baseline is not None and baseline not in named:
        raise ValueError(f"baseline is '{baseline}'; the curves are {', '.join(named) or 'none'}")
    check_symlog(symlog)
    ax = _draw_curves(named, steps, baseline, ax)
    ax.set_xlabel("step")
    if symlog is not None:
        set_symlog(ax, "y", symlog)
    return ax


def survival_curve(
    curves: Curves | Tensor,
    times: Sequence[float] | Tensor | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draws which share of the synapses present at the start is still there, with the 95 % band over members.

    Args:
        curves: what `measure.survival` gives, `(time,)`, or under vmap `(members, time)`; or several by name.
        times: `(time,)`; default: 0, 1, 2, ...
        ax: axes to draw on; default: new ones.

    Returns:
        The axes, in per cent.

    Raises:
        ValueError, TypeError: as for `learning_curves`.
    """
    named = curves if isinstance(curves, Mapping) else {"": curves}
    percent = {name: 100 * numbers_of(values) for name, values in named.items()}
    ax = _draw_curves(percent, times, None, ax)
    ax.set(xlabel="time", ylabel="surviving synapses (%)")
    if ax.get_yscale() == "linear":  # a logarithmic axis, on which exponentials are straight, has no 0
        ax.set_ylim(0, 103)
    return ax


def rate_spectrum(
    rates: BioState | Tensor,
    *,
    edges: Sequence[float] | None = None,
    where: Selection | BioState = None,
    colour: str = COLOURS[1],
    ax: Axes | None = None,
) -> Axes:
    """Draws a histogram of the synapses' learning rates, both axes logarithmic; the dotted line is the rate 1.

    Args:
        rates: a state, or a tensor of rates of any shape; of the stacked state of an ensemble, the rates of all members
            together.
        edges: rising, positive edges of the bars; the first takes what is smaller too, the last what is larger.
            Default: those of `measure.rate_spectrum`.
        where: which synapses of a state count; default: all.
        colour: of the bars.
        ax: axes to draw on; default: new ones.

    Returns:
        The axes, in per cent of the synapses.

    Raises:
        ValueError: edges that do not rise from above 0, or no rates.
        ValueError, TypeError, KeyError: as for `measure.rate_spectrum`.
    """
    edges = RATE_EDGES if edges is None else edges
    if not edges[0] > 0:
        raise ValueError(f"edges start at {edges[0]}; the axis is logarithmic, so they start above 0")
    spectrum = partial(measure.rate_spectrum, edges=edges, where=where)
    stacked = isinstance(rates, BioState) and rates.key.dim() > 1
    shares = numbers_of(torch.vmap(spectrum)(rates).mean(0) if stacked else spectrum(rates))
    if numpy.isnan(shares).any():
        raise ValueError("rates hold no synapse; there is nothing to draw")
    ax = axes_of(ax)
    ax.bar(edges[:-1], 100 * shares, numpy.diff(edges), align="edge", color=colour)
    ax.axvline(1, color=COLOURS[0], linewidth=1, linestyle=":")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel=f"learning-rate factor (first bar: ≤ {edges[1]:.2g})",
        ylabel="synapses (%)",
    )
    # Panels that share the axis widen it in turn
    ax.set_ylim(min(ax.get_ylim()[0], 50 * shares[shares > 0].min(), 0.1), 120)
    return ax


def size_distribution(
    params: Tree,
    *,
    where: Selection | BioState = None,
    bins: int = 60,
    colour: str = COLOURS[5],
    ax: Axes | None = None,
) -> Axes:
    """Draws a histogram of synaptic sizes |w| on a logarithmic axis, with the log-normal that has their moments.

    On this axis a log-normal is a symmetric bell, as the sizes of spines make it (Loewenstein, Kuras, Rumpel 2011, doi
    10.1523/JNEUROSCI.6130-10.2011). Weights of 0 are left out, and the legend gives mean and sd of ln |w|.

    Args:
        params: tree of parameters; the stacked ones of an ensemble with `where=`, or a bare tensor.
        where: which leaves count, as in `biofunc.measure`.
        bins: number of bars.
        colour: of the bars.
        ax: axes to draw on; default: new ones.

    Returns:
        The axes: the density of ln |w|.

    Raises:
        ValueError: all weights are 0, or there is none.
        TypeError, KeyError: as for `measure.sign_balance`.
    """
    sizes = numbers_of(all_weights(params, where).abs())
    sizes = sizes[sizes > 0]
    if not len(sizes):
        raise ValueError("params hold no weight other than 0; there is no size to draw")
    logs = numpy.log(sizes)
    mean, sd = logs.mean(), logs.std()
    half = max(4 * sd, 0.5)
    low, high = min(logs.min(), mean - half), max(logs.max(), mean + half)
    counts, edges = numpy.histogram(logs, bins, (low, high))
    ax = axes_of(ax)
    ax.bar(
        numpy.exp(edges[:-1]),
        counts / len(logs) / numpy.diff(edges),
        numpy.diff(numpy.exp(edges)),
        align="edge",
        color=colour,
        label=f"{len(logs):,} synapses",
    )
    if sd > 0:
        x = numpy.linspace(low, high, 300)
        density = numpy.exp(-0.5 * ((x - mean) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
        label = f"log-normal, ln |w| = {mean:.2f} ± {sd:.2f}"
        ax.plot(numpy.exp(x), density, color=COLOURS[0], linewidth=1.5, label=label)
    ax.set(xscale="log", xlabel="synaptic size |w|", ylabel="density of ln |w|")
    ax.set_ylim(0, 1.25 * max(ax.get_ylim()[1], ax.dataLim.y1))  # the legend lies above the bars
    ax.legend(frameon=False, fontsize="small", loc="upper left")
    return ax


def _draw_curves(curves: Curves, steps: Any, baseline: str | None, ax: Axes | None) -> Axes:
    if not isinstance(curves, Mapping):
        raise TypeError(f"curves is {type(curves).__name__}; give a dict of curves by name")
    runs = {name: numpy.atleast_2d(numbers_of(values)) for name, values in curves.items()}
    if not runs:
        raise ValueError("curves is empty; give at least one")
    times = next(iter(runs.values())).shape[-1]
    x = numpy.arange(times) if steps is None else numbers_of(steps)
    for name, values in runs.items():
        if values.ndim != 2 or values.shape[1] != len(x) or values.size == 0:
            raise ValueError(
                f"curves['{name}'] has shape {values.shape}; give (members, time), with {len(x)} times as all others"
            )
    ax = axes_of(ax)
    others = [name for name in runs if name != baseline]
    for name, values in runs.items():
        mean, members = values.mean(0), len(values)
        style: dict[str, Any]
        if name == baseline:
            colour, style = COLOURS[0], {"linestyle": ":", "zorder": 3}
        else:
            place = others.index(name)
            colour = COLOURS[1 + place % (len(COLOURS) - 1)]
            # Markers of arms that lie on each other stand side by side
            spacing = max(1, len(x) // 6)
            style = {"marker": MARKERS[place % len(MARKERS)], "markevery": (place * spacing // len(others), spacing)}
        label = name.replace("_", " ") or None
        ax.plot(x, mean, color=colour, linewidth=1.5, markersize=5, label=label, **style)
        if members > 1:
            half = 1.96 * values.std(0, ddof=1) / math.sqrt(members)
            ax.fill_between(x, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
    if any(runs):
        ax.legend(frameon=False, fontsize="small")
    return ax
