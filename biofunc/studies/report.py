"""The Markdown report of a study: what its analysis says, in tables."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from biofunc.studies.pictures import can_be_told_apart, curves_of

Table = Sequence[Sequence[str]]


def report(summary: Mapping[str, Any]) -> str:
    """The Markdown report.

    Args:
        summary: what results.json holds: "study", "results", "analysis", "meta".

    Returns:
        The text of report.md.
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
    if curves_of(summary["results"]) and can_be_told_apart(analysis["overall"]):
        blocks.append("![Curves](curves.png)")
    for name, condition in analysis["conditions"].items():
        blocks += [f"## {name}", *_condition_blocks(study, condition)]
    blocks += ["## The decision rule", *_rule_blocks(study)]
    return "\n\n".join(blocks) + "\n"


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
    """A Markdown table.

    Args:
        rows: of cells, as many in each; the first is the head.

    Returns:
        The lines, without one at the end.
    """
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
