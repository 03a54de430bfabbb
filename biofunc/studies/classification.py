"""Classification: arms with a tuned learning rate each, on small data sets, before and behind several optimizers.

All arms, learning rates and seeds that share a forward pass are members of one ensemble: a mechanism that an arm does
not have is at its off setting. A seed fixes the split, the initial weights, the batches and the noise of every arm. The
learning rate of an arm is chosen on validation data and reported on test data, with the same number of trials for all.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from biofunc import datasets
from biofunc.studies import Job, Results
from biofunc.studies.classification_arms import OFF, Group, arms, conditions, groups
from biofunc.studies.classification_training import OPTIMIZERS, Training, chunks_of


def check(study: dict[str, Any]) -> None:
    """Refuses a study of which something cannot be run.

    Args:
        study: what the file holds.

    Raises:
        ValueError: of one line.
        KeyError, TypeError: a setting is missing or of another type.
    """
    for name in study["data"]:
        if name not in datasets.DATASETS:
            raise ValueError(f"[data.{name}]: the data sets are {', '.join(datasets.DATASETS)}")
    for name, given in study["optimizers"].items():
        if name not in OPTIMIZERS:
            raise ValueError(f"[optimizers.{name}]: the optimizers are {', '.join(OPTIMIZERS)}")
        if not given["lr"] or not all([rate > 0 for rate in given["lr"]]):
            raise ValueError(f"[optimizers.{name}]: lr is {given['lr']}; give a list of positive numbers")
    for phase in study["phases"]:
        if phase not in ("gradient", "update"):
            raise ValueError(f"phases holds '{phase}'; it must be gradient or update")
    for name, given in [*study.get("arms", {}).items(), *study.get("factors", {}).items()]:
        for setting in given:
            if setting not in OFF:
                raise ValueError(f"'{name}' sets '{setting}'; it may set {', '.join(OFF)}")
    control = study["decision"]["control"]
    if control not in arms(study):
        raise ValueError(f"[decision]: control is '{control}'; the arms are {', '.join(arms(study))}")
    for left, right in study.get("controls", {}).items():
        for arm in (left, right):
            if arm not in arms(study):
                raise ValueError(f"[controls]: '{arm}' is no arm; the arms are {', '.join(arms(study))}")
    for name, task in study["data"].items():
        for setting in ("hidden", "steps", "turnover_period"):
            if not isinstance(task[setting], int) or task[setting] < 1:
                raise ValueError(f"[data.{name}]: {setting} is {task[setting]!r}; give a positive integer")
        for arm in arms(study).values():
            if int(task["hidden"] * arm["width"]) % int(arm["gamma"]):
                raise ValueError(f"[data.{name}]: gamma {arm['gamma']} does not divide the hidden units")


def jobs(study: dict[str, Any]) -> list[Job]:
    """One job for each data set, optimizer, phase and forward pass.

    Args:
        study: a study that `check` lets pass.

    Returns:
        The jobs.
    """
    return [
        Job(group.name, group.task["steps"] * chunks_of(group.members)[0], partial(_run, group))
        for group in groups(study)
    ]


def _run(group: Group, advance: Callable[[int], None]) -> Results:
    data = datasets.load(group.data)
    torch.compiler.reset()  # else the steps of many groups count as recompilations of one
    train = Training(group, data)
    chunks, size = chunks_of(group.members)
    parts = [train(torch.arange(i * size, (i + 1) * size), advance) for i in range(chunks)]
    metrics = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    results: Results = {}
    seeds = group.study["seeds"]
    for start, (arm, rate) in zip(
        range(0, group.members, seeds), itertools.product(group.arms, group.rates), strict=True
    ):
        for condition in conditions(group, arm):
            own = {name: values[start : start + seeds] for name, values in metrics.items()}
            results.setdefault(condition, {}).setdefault(arm, {})[f"lr={rate:g}"] = own
    return results
