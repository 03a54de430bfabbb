"""Gradient inversion: does what a mechanism does to a shared gradient keep the image behind it private?

A victim trains a network with a defence at work and then shares the gradients of single private images. A server that
knows architecture, weights, labels and the defence rebuilds them, by closed form from a perceptron and by the cosine
attack from a small network of convolutions. The attackers:

    unaware       takes a shared gradient at face value
    adaptive      knows the rule: averages the rounds, divides out what the weights give away (volume) and what a server
                  that saw every round can replay (crystallisation), looks for constant unknown rates together with all
                  images of the victim, and leaves out entries that are 0
    knows rates   is told the rates that the victim was born with, which bounds all attacks on them

Each attacker may also do what the one before it does, and the best image, by the truth, counts: in doubt the defence is
called weaker than it is. A mechanism is compared with gradient noise and pruning of equal cost in accuracy.

A lower PSNR is not yet privacy: at 30 dB a picture is as good as rebuilt. `better than the mean image` says how often
an attacker knew more than what the public data say.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

import biofunc as bf
from biofunc.compare import compiler_works
from biofunc.studies import Job, Results
from biofunc.studies.inversion_attacks import closed_form_images, cosine_images, observe
from biofunc.studies.inversion_victims import (
    Advance,
    Attack,
    Data,
    Defence,
    Defended,
    Task,
    Victims,
    load,
    train_victims,
)
from biofunc.studies.reconstruction import psnr, ssim

ATTACKERS = ("unaware", "adaptive", "knows rates")
SETTINGS = {
    "nu": "[0, 1)",
    "dampening_factor": "(0, 1]",
    "stability_factor": "[0, inf)",
    "lr_variability": "[0, inf)",
    "gamma": "an integer >= 1",
}
EIGHT_BITS = 58.9  # dB, 10 log10(12 255^2): the rounding error of a picture of 8 bits; a better one shows no more


def check(study: dict[str, Any]) -> None:
    """Refuses a study of which something cannot be run.

    Args:
        study: what the file holds.

    Raises:
        ValueError: of one line.
        KeyError, TypeError: a setting is missing or of another type.
    """
    for name in ("seeds", "steps", "iterations", "images", "rounds"):
        _check_number(name, study[name], minimum=1, whole=True)
    _check_number("smoothness", study["smoothness"], minimum=0)
    if study["arms"].get("none") != {}:
        raise ValueError("arms lacks none = {}, the gradient as it is, with which all are compared")
    for arm, settings in study["arms"].items():
        for name, value in settings.items():
            if name not in SETTINGS:
                raise ValueError(f"arm '{arm}' sets '{name}'; an arm sets {', '.join(SETTINGS)}")
            _check_number(f"{name} of arm '{arm}'", value, minimum=1 if name == "gamma" else 0, whole=name == "gamma")
            if (name == "nu" and value >= 1) or (name == "dampening_factor" and not 0 < value <= 1):
                raise ValueError(f"{name} of arm '{arm}' is {value}; it must lie in {SETTINGS[name]}")
    _check_number("matching.loss", study["matching"]["loss"], minimum=0)
    for kind, highest in (("noise", math.inf), ("pruning", 1.0)):
        strengths = study["matching"][kind]
        if not strengths or strengths != sorted(set(strengths)) or not 0 < strengths[0] <= strengths[-1] < highest:
            raise ValueError(f"matching.{kind} is {strengths}; give rising strengths in (0, {highest})")
    if not study["tasks"]:
        raise ValueError("tasks is empty; give at least one [[tasks]]")
    for settings in study["tasks"]:
        task = Task(**settings)
        if task.attack not in get_args(Attack):
            raise ValueError(f"a task has attack '{task.attack}'; it must be one of {', '.join(get_args(Attack))}")
        if task.data not in ("digits", "mnist5k"):
            raise ValueError(f"a task has data '{task.data}'; images are digits and mnist5k")
        if task.defended not in get_args(Defended):
            raise ValueError(f"a task has defended '{task.defended}'; give {' or '.join(get_args(Defended))}")
        sizes = (8,) if task.data == "digits" else (28, 14)
        if task.size not in sizes:
            raise ValueError(f"a task on {task.data} has size {task.size}; give {' or '.join(map(str, sizes))}")
        network = study["networks"][task.attack]
        _check_number(f"hidden of '{task.attack}'", network["hidden"], minimum=1, whole=True)
        _check_number(f"batch of '{task.attack}'", network["batch"], minimum=1, whole=True)
        _check_number(f"lr of '{task.attack}'", network["lr"], minimum=0)
        for arm, settings in study["arms"].items():
            if network["hidden"] % settings.get("gamma", 1):
                raise ValueError(f"gamma of arm '{arm}' does not divide hidden {network['hidden']} of '{task.attack}'")
    known = {*study["arms"], *[f"{kind} for {arm}" for kind in ("noise", "pruning") for arm in _mechanisms(study)]}
    for arm, other in study.get("controls", {}).items():
        for name in (arm, other):
            if name not in known:
                raise ValueError(f"controls names '{name}', which is no arm; the arms are {'; '.join(sorted(known))}")


def jobs(study: dict[str, Any]) -> list[Job]:
    """One job per task: training with every defence, choice of matched strengths, attacks."""
    tasks = [Task(**settings) for settings in study["tasks"]]
    return [Job(task.name, _steps(study, task), partial(_run, study, task)) for task in tasks]


def strongest(strengths: Sequence[float], losses: Sequence[float], allowed: float) -> float:
    """The largest strength that loses no more accuracy than allowed; the smallest of all if each loses more.

    Args:
        strengths: those tried.
        losses: mean loss of accuracy of each, against no defence.
        allowed: the loss of the mechanism that the strength is to match.
    """
    affordable = [strength for strength, loss in zip(strengths, losses, strict=True) if loss <= allowed]
    return max(affordable) if affordable else min(strengths)


def _check_number(name: str, value: Any, *, minimum: float, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not minimum <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; give {'an integer' if whole else 'a number'} of at least {minimum}")


def _mechanisms(study: dict[str, Any]) -> list[str]:
    return [arm for arm in study["arms"] if arm != "none"]


def _trainings(study: dict[str, Any]) -> int:
    return len(study["arms"]) + len(study["matching"]["noise"]) + len(study["matching"]["pruning"])


def _steps(study: dict[str, Any], task: Task) -> int:
    """At most: strengths that two mechanisms share are attacked once."""
    attacks: int = 3 * study["iterations"] * (len(study["arms"]) + 2 * len(_mechanisms(study)))
    training: int = _trainings(study) * study["steps"]
    return training + (attacks if task.attack == "cosine" else 0)


def _run(study: dict[str, Any], task: Task, advance: Advance) -> Results:
    if compiler_works("cpu"):
        bf.random.accelerate()
    done = 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        advance(steps)

    data = load(study, task)
    train = partial(train_victims, study, task, data, count)
    victims = {defence: train(defence) for defence in _candidates(study)}
    chosen = match(study, {defence: v.accuracy.mean().item() for defence, v in victims.items()})
    measured = {d: _measure(study, task, data, d, victims[d], count) for d in dict.fromkeys(chosen.values())}
    advance(_steps(study, task) - done)
    results: Results = {f"{task.name}, {attacker}": {} for attacker in ATTACKERS}
    for arm, defence in chosen.items():
        strength = defence.noise or defence.pruning
        for attacker in ATTACKERS:
            setting = f"strength={strength}" if strength else ""
            results[f"{task.name}, {attacker}"][arm] = {setting: measured[defence][attacker]}
    return results


def _candidates(study: dict[str, Any]) -> list[Defence]:
    return [
        *[Defence(**settings) for settings in study["arms"].values()],
        *[_alone(kind, strength) for kind in ("noise", "pruning") for strength in study["matching"][kind]],
    ]


def match(study: dict[str, Any], accuracy: dict[Defence, float]) -> dict[str, Defence]:
    """Chooses the strengths of noise and pruning that cost as much accuracy as each mechanism.

    Args:
        study: its arms and `matching`.
        accuracy: mean test accuracy with each defence.

    Returns:
        The defence of each arm, those of `noise for ARM` and `pruning for ARM` included.
    """
    chosen = {arm: Defence(**settings) for arm, settings in study["arms"].items()}
    plain = accuracy[Defence()]
    for arm in _mechanisms(study):
        allowed = max(plain - accuracy[chosen[arm]], study["matching"]["loss"])
        for kind in ("noise", "pruning"):
            strengths = study["matching"][kind]
            losses = [plain - accuracy[_alone(kind, strength)] for strength in strengths]
            chosen[f"{kind} for {arm}"] = _alone(kind, strongest(strengths, losses, allowed))
    return chosen


def _alone(kind: str, strength: float) -> Defence:
    return Defence(noise=strength) if kind == "noise" else Defence(pruning=strength)


def _measure(
    study: dict[str, Any], task: Task, data: Data, defence: Defence, victims: Victims, advance: Advance
) -> dict[str, dict[str, list[float]]]:
    """Metrics per attacker, one value per seed."""
    observed = observe(study, data, defence, victims)
    if task.attack == "closed form":
        found = closed_form_images(task, defence, observed)
    else:
        found = cosine_images(study, data, defence, victims, observed, advance)
    truth = data.truth()
    guess = psnr(data.mean_image(), truth)
    measured: dict[str, dict[str, list[float]]] = {}
    images: dict[str, Tensor] = {}
    for attacker in ATTACKERS:
        images |= found[attacker]
        quality = torch.stack([psnr(image, truth) for image in images.values()])
        best = quality.argmax(0)
        similarity = torch.stack([ssim(image, truth) for image in images.values()])
        highest = quality.amax(0)
        measured[attacker] = {
            "PSNR of the best attacker": highest.clamp(max=EIGHT_BITS).tolist(),
            "SSIM of the best attacker": similarity.gather(0, best.unsqueeze(0))[0].tolist(),
            "better than the mean image": (highest > guess).double().tolist(),
            "PSNR of the mean image": guess.tolist(),
            "test accuracy": victims.accuracy.double().tolist(),
            **{f"PSNR, {name}": psnr(image, truth).tolist() for name, image in found[attacker].items()},
        }
    return measured
