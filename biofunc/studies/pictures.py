"""Pictures of a study: differences with their intervals, and curves."""

import io
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy

from biofunc.plot import COLOURS
from biofunc.studies import Results
from biofunc.studies.analysis import CURVE

UP, DOWN = ("^", "#009E73"), ("v", "#D55E00")
MARKERS = {"helps": UP, "synergy": UP, "harms": DOWN, "interference": DOWN}
COLUMNS = 3


def pictures(summary: Mapping[str, Any]) -> dict[str, bytes]:
    """Draws what the analysis found.

    Args:
        summary: what results.json holds: "study", "results", "analysis", "meta".

    Returns:
        PNG pictures by file name: `forest.png`, and `curves.png` if there are curves, of arms that can be told apart.
    """
    study, conditions = summary["study"], summary["analysis"]["conditions"]
    forests: list[tuple[str, Callable[[Any], None]]] = []
    rows = longest = 1
    for name, condition in conditions.items():
        compared = {arm: found for arm, found in condition["arms"].items() if not found["is control"]}
        shown = {**condition.get("main effects", {}), **condition.get("interactions", {})} or compared
        forests.append((name, lambda axes, shown=shown: forest(axes, shown)))  # type: ignore[misc]
        rows, longest = max(rows, len(shown)), max([longest, *[len(label) for label in shown]])
    what = "effects" if study.get("factors") else f"difference to {study['decision']['control']}"
    label = f"{study['decision']['metric']}: {what}, 95 % CI"
    made = {"forest.png": _figure(forests, 2.6 + 0.06 * longest, 0.6 + 0.22 * rows, label)}
    curves: list[tuple[str, Callable[[Any], None]]] = []
    places = list(summary["analysis"]["overall"])
    for metric in curves_of(summary["results"]) if can_be_told_apart(places) else []:
        for name, condition in conditions.items():
            of_arm = {
                arm: summary["results"][name][found["arm"]][found["setting"]].get(metric)
                for arm, found in condition["arms"].items()
            }
            drawn = {arm: values for arm, values in of_arm.items() if values is not None}
            title = f"{name}: {metric.removeprefix(CURVE)}"
            if drawn:
                curves.append((title, lambda axes, drawn=drawn: learning_curves(axes, drawn, places)))  # type: ignore[misc]
    if curves:
        made["curves.png"] = _figure(curves, 4.2, 2.6, study.get("curve_label", "point of the curve"))
    return made


# biofunc.plot judges an interval by itself; here the verdict is that of the study, corrected for the number of arms.
def forest(axes: Any, arms: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws one row per arm: its mean paired difference with the interval; colour and marker show the verdict.

    Args:
        axes: of matplotlib.
        arms: what the analysis says of each.
    """
    for row, found in enumerate(arms.values()):
        marker, colour = MARKERS.get(found["verdict"], ("o", "#7F7F7F"))
        low, high = found["interval"]
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [row, row], color=colour, linewidth=1.5)
        axes.plot(found["difference"], row, marker, color=colour, markersize=5)
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(range(len(arms)), [name.replace("_", " ") for name in arms], fontsize="x-small")
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.locator_params("x", nbins=5)
    axes.tick_params(axis="x", labelsize="x-small")


def learning_curves(axes: Any, curves: Mapping[str, Sequence[Sequence[float]]], places: Sequence[str]) -> None:
    """Draws the mean over seeds of each arm; an arm has the same colour and line in all panels, by its place.

    Args:
        axes: of matplotlib.
        curves: by arm, one curve per seed.
        places: all arms of the study, in their order.
    """
    for name, values in curves.items():
        mean, place = numpy.asarray(values, dtype=float).mean(0), places.index(name)
        style = "-" if place < len(COLOURS) else "--"
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(range(1, len(mean) + 1), mean, style, color=colour, linewidth=1.2, label=name.replace("_", " "))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize="x-small")


def curves_of(results: Results) -> list[str]:
    """Names of the metrics that are curves.

    Args:
        results: of all jobs of a study.

    Returns:
        Each name once, in the order of the results.
    """
    every = [name for arms in results.values() for settings in arms.values() for m in settings.values() for name in m]
    return [name for name in dict.fromkeys(every) if name.startswith(CURVE)]


def can_be_told_apart(arms: Collection[str]) -> bool:
    """Whether each arm has a line of its own: a colour, solid or dashed.

    Args:
        arms: those of a picture.

    Returns:
        Whether it does.
    """
    return len(arms) <= 2 * len(COLOURS)


def _figure(panels: Sequence[tuple[str, Callable[[Any], None]]], width: float, height: float, label: str) -> bytes:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.8), layout="constrained")
    grid = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, (title, draw) in zip(grid, panels, strict=False):
        draw(axes)
        axes.set_title("\n".join(textwrap.wrap(title, 34)), fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.supxlabel(label, fontsize="small")
    named = {name: line for axes in grid for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if named:
        figure.legend(
            named.values(), named.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize="x-small"
        )
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    return picture.getvalue()
