"""Learning one task after another: does a network stay able to learn?

A network that has learnt many tasks learns the next one worse: units die, weights grow. Each arm has one mechanism, or
one of the rivals from machine learning, and meets the same tasks:

    random_label_digits    the same digits, each time with new random labels, ten of equally many: a network that knows
                           nothing comes to 0.1, and below where it repeats what it has just seen
    permuted_digits        all digits with their own labels, each time with their pixels in a new random order

What counts is the online accuracy: of each batch before the network learns from it, averaged over a task.

All arms are one chain in which mechanisms that an arm does not have are off, so that one compilation serves them. A
seed fixes tasks, order of the batches, initial weights and noise, for every arm. The strength of a mechanism is chosen
on tuning seeds, and judged on others.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy

from biofunc.studies import Job, Results
from biofunc.studies.continual_chains import ARMS, OFF, REDRAWING, hyperparameters, make_chain, make_periodic_chain
from biofunc.studies.continual_training import BATCH, CHUNK, LAST, Member, Trainer

DIGITS = 1797
TASKS = ("random_label_digits", "permuted_digits")
OPTIMIZERS = ("sgd", "adam")


def check(study: Mapping[str, Any]) -> None:
    """Raises a ValueError with one line if the study names what there is not, or holds a number out of its range."""
    for kind, known in (("tasks", TASKS), ("optimizers", OPTIMIZERS), ("arms", ARMS)):
        if not study.get(kind):
            raise ValueError(f"the study has no {kind}; give one or more of {', '.join(known)}")
        for name in study[kind]:
            if name not in known:
                raise ValueError(f"{kind} holds '{name}'; it must be one of {', '.join(known)}")
    if "plain" not in study["arms"]:
        raise ValueError("arms lacks 'plain'; the learning rate is chosen with it")
    for name, task in study["tasks"].items():
        limits = {
            "samples": (BATCH, DIGITS),
            "tasks": (LAST, math.inf),
            "epochs": (1, math.inf),
            "period": (1, math.inf),
        }
        for key, (least, most) in limits.items():
            value = task.get(key)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"tasks.{name}.{key} is {value!r}; it must be an integer in [{least}, {most}]")
    for name, optimizer in study["optimizers"].items():
        rates = optimizer.get("lr")
        if not rates or any(isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0 for lr in rates):
            raise ValueError(f"optimizers.{name}.lr is {rates!r}; it must be a list of positive numbers")
    for arm, settings in study["arms"].items():
        mechanism = ARMS[arm]
        known = OFF[mechanism] if mechanism else {}
        if not settings:
            raise ValueError(f"arms.{arm} has no setting; give a list of tables of {', '.join(known) or 'nothing: {}'}")
        for setting in settings:
            for key in setting:
                if key not in known:
                    raise ValueError(f"arms.{arm} sets '{key}'; it takes {', '.join(known) or 'nothing'}")
            try:
                make_chain("sgd", 0.1, hyperparameters(arm, setting))
                make_periodic_chain(hyperparameters(arm, setting), redraws=True)
            except (TypeError, ValueError) as error:
                raise ValueError(f"arms.{arm}: {error}") from error
    seeds = study.get("tuning_seeds")
    if not seeds or any(isinstance(seed, bool) or not isinstance(seed, int) for seed in seeds):
        raise ValueError(f"tuning_seeds is {seeds!r}; it must be a list of integers")
    if any(0 <= seed < study["seeds"] for seed in seeds):
        raise ValueError(f"tuning_seeds {seeds} meet the {study['seeds']} seeds of the comparison; choose others")


def jobs(study: Mapping[str, Any]) -> list[Job]:
    """One job per task and optimizer: the strengths of all arms are tuned, then the chosen ones compared.

    Args:
        study: a study that `check` lets pass.

    Returns:
        The jobs. A result holds "tuning accuracy", one value per tuning seed, of every setting, and all other metrics,
        one value per seed, of the chosen setting of each arm.
    """
    return [
        Job(
            f"{task} {optimizer}",
            _steps(study["tasks"][task]) * _chunks(study, optimizer),
            partial(_run, study, task, optimizer),
        )
        for task in study["tasks"]
        for optimizer in study["optimizers"]
    ]


def _run(study: Mapping[str, Any], task: str, optimizer: str, advance: Callable[[int], None]) -> Results:
    """Tunes the learning rate with the plain arm, then every arm, then compares the chosen settings."""
    trainer = Trainer(task, optimizer, study["tasks"][task])
    arms, tuning_seeds = study["arms"], study["tuning_seeds"]
    rates = study["optimizers"][optimizer]["lr"]
    found: dict[str, dict[str, dict[str, list[Any]]]] = {arm: {} for arm in arms}

    def tune(members: list[Member], name: Callable[[Member], str]) -> None:
        runs = trainer.train(members, advance)
        for member, metrics in zip(members, runs, strict=True):
            kept = found[member.arm].setdefault(name(member), {"tuning accuracy": []})
            kept["tuning accuracy"].append(metrics["mean online accuracy"])

    def best(arm: str) -> str:
        return max(found[arm], key=lambda setting: float(numpy.mean(found[arm][setting]["tuning accuracy"])))

    tune([Member("plain", {}, lr, seed) for lr in rates for seed in tuning_seeds], lambda member: f"lr={member.lr:g}")
    lr = {f"lr={rate:g}": rate for rate in rates}[best("plain")]
    tune(
        [
            Member(arm, setting, lr, seed)
            for arm in arms
            if arm != "plain"
            for setting in arms[arm]
            for seed in tuning_seeds
        ],
        lambda member: describe(member.setting),
    )
    chosen = {arm: {describe(setting): setting for setting in arms[arm]}.get(best(arm), {}) for arm in arms}
    members = [Member(arm, chosen[arm], lr, seed) for arm in arms for seed in range(study["seeds"])]
    for member, metrics in zip(members, trainer.train(members, advance), strict=True):
        kept = found[member.arm][best(member.arm)]
        for metric, value in metrics.items():
            kept.setdefault(metric, []).append(value)
    return {f"{task}, {optimizer}": found}


def describe(setting: Mapping[str, float]) -> str:
    """A setting as text: "rate=0.01"."""
    return " ".join([f"{name}={value:g}" for name, value in setting.items()])


def _steps(plan: Mapping[str, int]) -> int:
    return plan["tasks"] * plan["epochs"] * (plan["samples"] // BATCH)


def _chunks(study: Mapping[str, Any], optimizer: str) -> int:
    """How many chunks `_run` trains: for the learning rate, for the strengths, and for the comparison."""
    seeds, tuning_seeds = study["seeds"], len(study["tuning_seeds"])
    members = [len(study["optimizers"][optimizer]["lr"]) * tuning_seeds]
    for redraws in (False, True):
        arms = [arm for arm in study["arms"] if (arm in REDRAWING) == redraws]
        members.append(sum([len(study["arms"][arm]) for arm in arms if arm != "plain"]) * tuning_seeds)
        members.append(len(arms) * seeds)
    return sum([math.ceil(count / CHUNK) for count in members])
