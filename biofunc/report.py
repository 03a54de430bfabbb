"""What the comparison shows: statistics of paired seeds, a table, a results file and two pictures."""

import json
import math
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch

from biofunc import __version__
from biofunc.compare import Comparison

THRESHOLD = 0.9
RESAMPLES = 9999
NOTE = (
    "seconds: an arm's share of the time of the arms that run together with it, compilation included.\n"
    "weight_splitting: with the identity activation, this network is exactly one with half as many hidden neurons and\n"
    "twice the learning rate; no arm controls for that."
)


def summarise(comparison: Comparison) -> dict[str, Any]:
    """Results as plain numbers: same seeds and execution, same results.

    Args:
        comparison: from `compare`.

    Returns:
        What goes into results.json, without its "meta" key.
    """
    plain = comparison.arms["plain"].accuracy[-1].double().numpy()
    arms: dict[str, Any] = {}
    for name, arm in comparison.arms.items():
        final = arm.accuracy[-1].double().numpy()
        low, high = _confidence_interval(final - plain)
        arms[name] = {
            "accuracy": float(final.mean()),
            "accuracy_sd": float(final.std(ddof=1)) if len(final) > 1 else None,
            "difference": float((final - plain).mean()),
            "difference_ci": None if math.isnan(low) else [low, high],
            "steps_to_threshold": _steps_to_threshold(comparison, name),
            "accuracy_by_seed": final.tolist(),
            "curve": arm.accuracy.double().mean(1).tolist(),
        }
    config = {name: value for name, value in vars(comparison.config).items() if name != "arms"}
    return {"config": config, "threshold": THRESHOLD, "evaluated_steps": comparison.evaluated, "arms": arms}


def meta(comparison: Comparison, seconds: float) -> dict[str, Any]:
    """What may differ from run to run: time, machine, versions.

    Args:
        comparison: from `compare`.
        seconds: that it took in all.

    Returns:
        The entry "meta" of results.json.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "seconds_by_arm": {name: arm.seconds for name, arm in comparison.arms.items()},
        "execution": comparison.execution,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {"biofunc": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def table(summary: Mapping[str, Any], seconds: Mapping[str, float]) -> str:
    """The results as a Markdown table; differences in percentage points.

    Args:
        summary: from `summarise`.
        seconds: by arm.

    Returns:
        The lines of the table.
    """
    header = ("arm", "test accuracy", "difference to plain [95 % CI]", "steps to 90 %", "seconds")
    rows = [header]
    for name, arm in summary["arms"].items():
        interval = arm["difference_ci"]
        difference = f"{100 * arm['difference']:+.2f}" + (
            f" [{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}]" if interval else " [needs 2 seeds]"
        )
        steps = arm["steps_to_threshold"]
        rows.append(
            (
                name,
                f"{100 * arm['accuracy']:.2f} %",
                "-" if name == "plain" else difference,
                f"> {summary['evaluated_steps'][-1]}" if steps is None else f"{steps:g}",
                f"{seconds[name]:.1f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def write(folder: Path, summary: Mapping[str, Any], meta: Mapping[str, Any], comparison: Comparison) -> None:
    """Writes results.json, curves.png and rates.png; a file is replaced only when its successor is complete."""
    text = json.dumps({**summary, "meta": meta}, indent=1, allow_nan=False) + "\n"
    (folder / "results.json.partial").write_text(text)
    (folder / "results.json.partial").replace(folder / "results.json")
    for name, figure in (("curves", curves_figure(comparison)), ("rates", rates_figure(comparison))):
        figure.savefig(folder / f"{name}.partial.png", dpi=150)
        (folder / f"{name}.partial.png").replace(folder / f"{name}.png")


def curves_figure(comparison: Comparison) -> Any:
    """Learning curves with bands, and their paired difference to plain: mean and 95 % band of the mean over seeds."""
    from matplotlib.figure import Figure

    from biofunc import plot

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    accuracy = {name: 100 * arm.accuracy.double().T for name, arm in comparison.arms.items()}
    differences = {name: curve - accuracy["plain"] for name, curve in accuracy.items() if name != "plain"}
    plot.learning_curves(accuracy, comparison.evaluated, baseline="plain", ax=left)
    left.set(ylabel="test accuracy (%)", title="Learning curves")
    right.axhline(0, color=plot.COLOURS[0], linewidth=1)
    if differences:
        # Straight to one point, logarithmic beyond: early differences are tens of points, final ones tenths
        plot.learning_curves(differences, comparison.evaluated, symlog=1, ax=right).legend().remove()
    right.set(xlabel="step", ylabel="percentage points", title="Paired difference to plain")
    return figure


def rates_figure(comparison: Comparison) -> Any:
    """Spectrum of per-synapse learning rates at the end of training, one panel for each arm in which they differ."""
    from matplotlib.figure import Figure

    from biofunc import plot

    varied = {name: arm.rates for name, arm in comparison.arms.items() if arm.rates.min() < arm.rates.max()}
    figure = Figure(figsize=(3.4 * max(1, len(varied)), 3.2), layout="constrained")
    panels = figure.subplots(1, max(1, len(varied)), squeeze=False, sharey=True)[0]
    for axes, (name, rates) in zip(panels, varied.items(), strict=False):
        colour = plot.COLOURS[list(comparison.arms).index(name) % len(plot.COLOURS)]
        plot.rate_spectrum(rates, colour=colour, ax=axes).set(title=name.replace("_", " "))
        axes.label_outer()
    if not varied:
        panels[0].text(0.5, 0.5, "all synapses learn at rate 1", ha="center", transform=panels[0].transAxes)
    return figure


def _confidence_interval(differences: Any) -> tuple[float, float]:
    """95 % BCa bootstrap interval of the mean of paired differences."""
    from scipy.stats import bootstrap

    if len(differences) < 2:
        return math.nan, math.nan
    if numpy.ptp(differences) == 0:  # no spread: the bootstrap distribution is a point
        return float(differences[0]), float(differences[0])
    interval = bootstrap((differences,), numpy.mean, n_resamples=RESAMPLES, rng=0).confidence_interval
    return float(interval.low), float(interval.high)


def _steps_to_threshold(comparison: Comparison, name: str) -> float | None:
    """Median over seeds of the first evaluated step at the threshold; None when half the seeds never reach it."""
    reached = comparison.arms[name].accuracy >= THRESHOLD
    first = [
        next((step for step, hit in zip(comparison.evaluated, seed, strict=True) if hit), math.inf)
        for seed in reached.T
    ]
    median = float(numpy.median(first))
    return median if math.isfinite(median) else None
