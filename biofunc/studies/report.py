"""What a study shows: comparisons, verdicts, a Markdown report and pictures, all from the results of its jobs."""

import io
import math
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy

from biofunc import statistics
from biofunc.plot import COLOURS
from biofunc.studies import Results

CURVE = "curve "
"""Metrics of this prefix hold a list of numbers per seed."""

WAITING = "steps to "
"""Metrics of this prefix are waiting times, infinite where a run never got there: medians are shown."""

UP, DOWN = ("^", "#009E73"), ("v", "#D55E00")
MARKERS = {"helps": UP, "synergy": UP, "harms": DOWN, "interference": DOWN}
COLUMNS = 3

Table = Sequence[Sequence[str]]
Settings = Mapping[str, Mapping[str, list[Any]]]


def analyse(study: Mapping[str, Any], results: Results) -> dict[str, Any]:
    """Compares all arms and decides, by the rule that the study fixes.

    Args:
        study: from `experiment.load`.
        results: of all its jobs.

    Returns:
        "conditions": by condition, "arms" (by arm, what is known of it), "controls" (a list of further comparisons)
        and, for a study with factors, "main effects" and "interactions"; "overall": by arm, over all conditions.

    Raises:
        ValueError: the results lack the metric or the control, or runs are not paired.
    """
    order = list(dict.fromkeys([arm for arms in results.values() for arm in arms]))
    ordered = {name: {arm: arms[arm] for arm in order if arm in arms} for name, arms in results.items()}
    conditions = {name: _condition(study, name, arms) for name, arms in ordered.items()}
    return {"conditions": conditions, "overall": _overall(conditions)}


def report(summary: Mapping[str, Any]) -> str:
    """The Markdown report.

    Args:
        summary: what results.json holds: "study", "results", "analysis", "meta".
    """
    study, analysis, meta = summary["study"], summary["analysis"], summary["meta"]
    blocks = [f"# Study: {study['name']}"]
    if study["quick"]:
        text = "**Quick run: few seeds and steps, to see that everything works. It decides nothing.**"
        blocks = [text, *blocks]
    blocks += [study["question"], f"To run it again: `{meta['command']}`"]
    versions = ", ".join(f"{name} {version}" for name, version in meta["versions"].items())
    blocks.append(
        f"{study['seeds']} seeds per arm. {versions}; {meta['machine']}, {_count(meta['threads'], 'thread')} on "
        f"{_count(meta['cores'], 'core')}; {meta['seconds']:.0f} s in all; {meta['date']}."
    )
    if study.get("notes"):
        blocks.append("\n".join(f"- {note}" for note in study["notes"]))
    blocks += ["## All conditions", *_overall_blocks(study, analysis["overall"])]
    blocks.append("![Differences](forest.png)")
    if _curves_of(summary["results"]) and _can_be_told_apart(analysis["overall"]):
        blocks.append("![Curves](curves.png)")
    for name, condition in analysis["conditions"].items():
        blocks += [f"## {name}", *_condition_blocks(study, condition)]
    blocks += ["## The decision rule", *_rule_blocks(study)]
    return "\n\n".join(blocks) + "\n"


def pictures(summary: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG pictures by file name: `forest.png`, and `curves.png` if there are curves, of arms that can be told apart."""
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
    for metric in _curves_of(summary["results"]) if _can_be_told_apart(places) else []:
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
    """Draws one row per arm: its mean paired difference with the interval; colour and marker show the verdict."""
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
    """Draws the mean over seeds of each arm; an arm has the same colour and line in all panels, by its place."""
    for name, values in curves.items():
        mean, place = numpy.asarray(values, dtype=float).mean(0), places.index(name)
        style = "-" if place < len(COLOURS) else "--"
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(range(1, len(mean) + 1), mean, style, color=colour, linewidth=1.2, label=name.replace("_", " "))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize="x-small")


def _condition(study: Mapping[str, Any], name: str, arms: Mapping[str, Settings]) -> dict[str, Any]:
    decision = study["decision"]
    rows: dict[str, dict[str, Any]] = {}
    for arm, settings in arms.items():
        for setting in _chosen(decision, settings):
            label = arm if "select" in decision or len(settings) == 1 else f"{arm}, {setting}"
            rows[label] = {"arm": arm, "setting": setting, "is control": arm == decision["control"]}
            rows[label] |= _description(decision, list(settings), setting, settings[setting], f"{name}, {label}")
    if not any(row["is control"] for row in rows.values()):
        raise ValueError(f"condition '{name}' has no arm '{decision['control']}', the control")
    compared = [(label, _partner(rows, row, decision["control"], name)) for label, row in rows.items()]
    for (label, control), found in zip(compared, _comparisons(study, rows, compared), strict=True):
        rows[label] |= {"control": control, **found}
    further = [
        (label, _partner(rows, row, study["controls"][row["arm"]], name))
        for label, row in rows.items()
        if row["arm"] in study.get("controls", {}) and study["controls"][row["arm"]] in arms
    ]
    controls = [
        {"arm": label, "control": control, **found}
        for (label, control), found in zip(further, _comparisons(study, rows, further), strict=True)
    ]
    return {"arms": rows, "controls": controls, **_factorial(study, rows)}


def _chosen(decision: Mapping[str, Any], settings: Settings) -> list[str]:
    """The setting of an arm with the best mean of the selecting metric; all of them if nothing selects."""
    if "select" not in decision or len(settings) == 1:
        return list(settings)
    sign = -1 if decision.get("select_smaller_is_better", decision.get("smaller_is_better", False)) else 1
    scores = {
        setting: sign * float(numpy.mean(metrics[decision["select"]]))
        for setting, metrics in settings.items()
        if decision["select"] in metrics
    }
    if not scores:
        raise ValueError(f"no setting has the metric '{decision['select']}', by which the study selects")
    return [max(scores, key=lambda setting: -math.inf if math.isnan(scores[setting]) else scores[setting])]


def _description(
    decision: Mapping[str, Any], settings: list[str], setting: str, metrics: Mapping[str, list[Any]], where: str
) -> dict[str, Any]:
    if decision["metric"] not in metrics:
        raise ValueError(f"'{where}' has no '{decision['metric']}', the metric of the decision")
    values = metrics[decision["metric"]]
    others = {
        name: _central(name, found)
        for name, found in metrics.items()
        if name != decision["metric"] and not name.startswith(CURVE)
    }
    edge = "select" in decision and len(settings) > 2 and setting in (settings[0], settings[-1])
    return {
        "values": values,
        "mean": float(numpy.mean(values)),
        "iqm": statistics.iqm(values),
        "iqm interval": list(statistics.iqm_interval([values])),
        "at the edge": edge,
        "others": others,
    }


def _central(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Median of waiting times, with the number of runs that never got there; mean of all else."""
    if not name.startswith(WAITING):
        return {"mean": float(numpy.mean(values))}
    # The upper of two middle values: infinite if half the runs never got there, and never between a number and infinity
    return {"median": float(sorted(values)[len(values) // 2]), "never": sum([math.isinf(v) for v in values])}


def _partner(rows: Mapping[str, Mapping[str, Any]], row: Mapping[str, Any], control: str, condition: str) -> str:
    """The control's row of the same setting, or its only one."""
    found = {other["setting"]: label for label, other in rows.items() if other["arm"] == control}
    if row["setting"] not in found and len(found) != 1:
        raise ValueError(f"condition '{condition}': '{control}' has no setting '{row['setting']}', nor just one")
    return found[row["setting"]] if row["setting"] in found else next(iter(found.values()))


def _comparisons(
    study: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], pairs: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Paired comparisons of rows with others; Holm over all of them but those of a row with itself."""
    found = []
    for label, control in pairs:
        arm, base = rows[label]["values"], rows[control]["values"]
        if len(arm) != len(base):
            raise ValueError(f"'{label}' has {len(arm)} seeds and '{control}' {len(base)}; comparisons are paired")
        with numpy.errstate(invalid="ignore"):  # two infinite values have no difference
            differences = [float(d) for d in numpy.subtract(arm, base)]
        better = (base, arm) if study["decision"].get("smaller_is_better", False) else (arm, base)
        found.append(
            {**_tested(differences), "probability of improvement": statistics.probability_of_improvement(*better)}
        )
    itself = [label == control for label, control in pairs]
    return _decided(study, found, itself, ("helps", "harms", "no effect found"))


def _tested(differences: Sequence[float]) -> dict[str, Any]:
    return {
        "difference": float(numpy.mean(differences)),
        "interval": list(statistics.bca_interval(differences)),
        "p": statistics.sign_flip_test(differences),
    }


def _decided(
    study: Mapping[str, Any], found: list[dict[str, Any]], itself: Sequence[bool], names: tuple[str, str, str]
) -> list[dict[str, Any]]:
    """Adds corrected p and verdict; a comparison of a control with itself has neither."""
    decision = study["decision"]
    alpha, smallest = decision.get("alpha", 0.05), decision.get("smallest", 0.0)
    names = (names[1], names[0], names[2]) if decision.get("smaller_is_better", False) else names
    corrected = statistics.holm([math.nan if own else f["p"] for f, own in zip(found, itself, strict=True)])
    for comparison, p, own in zip(found, corrected, itself, strict=True):
        low, high = comparison["interval"]
        claim = statistics.verdict(
            comparison["difference"], (low, high), p, alpha=alpha, smallest=smallest, names=names
        )
        comparison |= {"p holm": p, "verdict": "control" if own else "quick run" if study["quick"] else claim}
    return found


def _factorial(study: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Main effects and pairwise interactions, in a study in which every subset of its factors is an arm."""
    factors = list(study.get("factors", {}))
    if not factors:
        return {}
    outcomes = {frozenset(() if row["is control"] else row["arm"].split(" + ")): row["values"] for row in rows.values()}
    alone = {factor: _tested(statistics.main_effect(outcomes, factor)) for factor in factors}
    pairs = [(a, b) for i, a in enumerate(factors) for b in factors[i + 1 :]]
    together = {f"{a} × {b}": _tested(statistics.interaction(outcomes, a, b)) for a, b in pairs}
    _decided(study, list(alone.values()), [False] * len(alone), ("helps", "harms", "no effect found"))
    _decided(study, list(together.values()), [False] * len(together), ("synergy", "interference", "none found"))
    return {"main effects": alone, "interactions": together}


def _overall(conditions: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """By arm over all conditions; runs that count in two conditions are pooled once."""
    overall: dict[str, Any] = {}
    labels = dict.fromkeys([label for condition in conditions.values() for label in condition["arms"]])
    for label in labels:
        held = [condition["arms"] for condition in conditions.values() if label in condition["arms"]]
        pairs = {(tuple(a[label]["values"]), tuple(a[a[label]["control"]]["values"])) for a in held}
        distinct = [(values, control) for values, control in sorted(pairs)]
        verdicts = [arms[label]["verdict"] for arms in held]
        differences = [numpy.subtract(values, control).tolist() for values, control in distinct]
        same_seeds = len({len(values) for values, _ in distinct}) == 1
        overall[label] = {
            "conditions": len(held),
            "iqm": statistics.iqm(numpy.concatenate([values for values, _ in distinct])),
            "iqm of differences": statistics.iqm(numpy.concatenate(differences)),
            "interval": list(statistics.iqm_interval(differences)) if same_seeds else [math.nan, math.nan],
            "probability of improvement": float(
                numpy.mean([arms[label]["probability of improvement"] for arms in held])
            ),
            "verdicts": {name: verdicts.count(name) for name in dict.fromkeys(verdicts)},
        }
    return overall


def _overall_blocks(study: Mapping[str, Any], overall: Mapping[str, Any]) -> list[str]:
    digits = _digits([found["iqm"] for found in overall.values()])
    rows = [
        ("arm", "conditions", "IQM", "IQM of differences [95 % CI]", "P(better than control)", "verdicts"),
        *[
            (
                label,
                str(found["conditions"]),
                f"{found['iqm']:.{digits}f}",
                "-" if "control" in found["verdicts"] else _interval(found, "iqm of differences", digits),
                "-" if "control" in found["verdicts"] else f"{found['probability of improvement']:.2f}",
                ", ".join(f"{name}: {count}" for name, count in found["verdicts"].items() if name != "control") or "-",
            )
            for label, found in overall.items()
        ],
    ]
    text = (
        f"{study['decision']['metric']}, over all seeds and conditions. IQM: the mean of the middle half; its interval "
        "resamples seeds. P: the chance that a random run of the arm is better than one of its control. Runs that "
        "count in two conditions are pooled once."
    )
    return [text, table(rows)]


def _condition_blocks(study: Mapping[str, Any], condition: Mapping[str, Any]) -> list[str]:
    metric = study["decision"]["metric"]
    arms: Mapping[str, Any] = condition["arms"]
    digits = _digits([found["mean"] for found in arms.values()])
    header = ("arm", "setting", metric, "difference [95 % CI]", "p (Holm)", "IQM [95 % CI]", "P(better)", "verdict")
    rows = [header]
    for label, found in arms.items():
        setting = f"{found['setting'] or '-'}{' (edge)' if found['at the edge'] else ''}"
        iqm = {"iqm": found["iqm"], "interval": found["iqm interval"]}
        known = (label, setting, f"{found['mean']:.{digits}f}")
        against = (_interval(found, "difference", digits), _p(found["p holm"]))
        rows.append(
            (*known, "-", "-", _interval(iqm, "iqm", digits, ""), "-", "control")
            if found["verdict"] == "control"
            else (
                *known,
                *against,
                _interval(iqm, "iqm", digits, ""),
                f"{found['probability of improvement']:.2f}",
                _claim(found, digits),
            )
        )
    blocks = [*_factorial_blocks(condition, digits), table(rows)]
    if any(found["at the edge"] for found in arms.values()):
        blocks.append("(edge): the best setting is the first or last of the sweep; one beyond it may be better.")
    if names := list(dict.fromkeys([name for found in arms.values() for name in found["others"]])):
        others = [("arm", *names)]
        others += [(label, *[_other(found["others"].get(name)) for name in names]) for label, found in arms.items()]
        blocks += ["Other metrics (means; medians of waiting times):", table(others)]
    if condition["controls"]:
        further = [("arm", "compared with", "difference [95 % CI]", "p (Holm)", "verdict")]
        further += [(found["arm"], found["control"], *_row(found, digits)) for found in condition["controls"]]
        blocks += ["Further controls:", table(further)]
    return blocks


def _factorial_blocks(condition: Mapping[str, Any], digits: int) -> list[str]:
    if "main effects" not in condition:
        return []
    blocks = [
        "A main effect is the mean difference that a mechanism makes, over all combinations of the others. An "
        "interaction is how much more two do together than the sum of each alone, again over all combinations."
    ]
    for name in ("main effects", "interactions"):
        effects = [(name, "effect [95 % CI]", "p (Holm)", "verdict")]
        effects += [(label, *_row(found, digits)) for label, found in condition[name].items()]
        blocks.append(table(effects))
    return [*blocks, "Every combination against the control:"]


def _rule_blocks(study: Mapping[str, Any]) -> list[str]:
    decision = study["decision"]
    better, worse = ("smaller", "larger") if decision.get("smaller_is_better", False) else ("larger", "smaller")
    alpha, smallest = decision.get("alpha", 0.05), decision.get("smallest", 0.0)
    text = (
        f"Fixed in the study's file before the first run. An arm helps if its {_mean_of(decision['metric'])} is "
        f"{better} than the control's, harms if it is {worse}: provided that the 95 % BCa bootstrap interval of the "
        "mean difference, paired by seed, leaves out 0, that p of the sign-flip permutation test, corrected by Holm "
        f"over all arms of a condition, is below {alpha:g}, and that the mean difference is at least {smallest:g}. All "
        "else is no effect found; the interval says how large an effect may have been missed."
    )
    if "select" in decision:
        best = _mean_of(decision["select"])
        text += f" The setting of an arm is the one with the best {best} over seeds, per condition."
    lines = [f"{name} = {value if not isinstance(value, str) else repr(value)}" for name, value in decision.items()]
    return [text, "\n".join(["```toml", "[decision]", *lines, "```"])]


def table(rows: Table) -> str:
    """A Markdown table; the first row is its head."""
    widths = [max([len(row[column]) for row in rows]) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join([f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)]) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join(["-" * (width + 2) for width in widths]) + "|", *lines[1:]])


def _row(found: Mapping[str, Any], digits: int) -> tuple[str, str, str]:
    return _interval(found, "difference", digits), _p(found["p holm"]), _claim(found, digits)


def _claim(found: Mapping[str, Any], digits: int) -> str:
    if found["verdict"] not in ("no effect found", "none found"):
        return str(found["verdict"])
    low, high = found["interval"]
    why = f", p {_p(found['p holm'])}" if low > 0 or high < 0 else ""  # the interval alone would have seen one
    return f"{found['verdict']} (CI {low:+.{digits}f} … {high:+.{digits}f}{why})"


def _interval(found: Mapping[str, Any], name: str, digits: int, sign: str = "+") -> str:
    low, high = found["interval"]
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{found[name]:{sign}.{digits}f} [none]"
    return f"{found[name]:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _mean_of(metric: str) -> str:
    return metric if metric.startswith("mean ") else f"mean {metric}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


def _p(p: float) -> str:
    return "-" if math.isnan(p) else "< 0.0001" if p < 1e-4 else f"{p:.4f}"


def _other(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if "mean" in found:
        return f"{found['mean']:.4g}"
    median = "never" if math.isinf(found["median"]) else f"{found['median']:g}"
    return f"{median} ({found['never']} never)" if found["never"] else median


def _digits(values: Iterable[float]) -> int:
    """Decimals that show a ten-thousandth of what is measured in units, a hundredth of what is measured in tens."""
    largest = max([abs(value) for value in values if math.isfinite(value)], default=1.0)
    return 4 if largest < 2 else 3 if largest < 20 else 2


def _curves_of(results: Results) -> list[str]:
    every = [name for arms in results.values() for settings in arms.values() for m in settings.values() for name in m]
    return [name for name in dict.fromkeys(every) if name.startswith(CURVE)]


def _can_be_told_apart(arms: Collection[str]) -> bool:
    """Whether each arm has a line of its own: a colour, solid or dashed."""
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
