"""What the results of a study say: arms compared with their controls, paired by seed, and verdicts."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from biofunc import statistics
from biofunc.studies import Results

CURVE = "curve "
"""Metrics of this prefix hold a list of numbers per seed."""

WAITING = "steps to "
"""Metrics of this prefix are waiting times, infinite where a run never got there: medians are shown."""

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
