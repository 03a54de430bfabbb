"""The chains of the study of continual learning: those of all arms in one, mechanisms that an arm does not have off."""

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeAlias

import biofunc as bf
from biofunc.state import BioState
from biofunc.studies.l2_init import l2_init
from biofunc.studies.shrink_and_perturb import shrink_and_perturb
from biofunc.trees import Leaves

Hyper: TypeAlias = dict[str, dict[str, Any]]
OFF: Hyper = {
    "l2_init": {"strength": 0.0},
    "crystallize": {"dampening_factor": 1.0, "floor": 0.0, "recovery": 0.0},
    "fuzzy_learning_rates": {"nu": 0.0},
    "synaptic_scaling": {"rate": 0.0},
    "rejuvenate_weights": {"rate": 0.0},
    "random_turnover": {"rate": 0.0},
    "shrink_and_perturb": {"shrink": 0.0, "perturb": 0.0},
}
"""Hyperparameters of the mechanisms under which all of them are the identity."""

ARMS = {"plain": None, **{rule: rule for rule in OFF}, "crystallize_recovering": "crystallize"}
"""The mechanism of each arm."""

REDRAWING = ("rejuvenate_weights", "random_turnover")
"""Arms that need the state of re-drawn synapses; the others run as a group without it, with the same numbers."""


def make_chain(optimizer: str, lr: Any, hyper: Hyper) -> bf.Chain:
    """What every arm does at each step: mechanisms that it does not have are off.

    Args:
        optimizer: "sgd" or "adam".
        lr: learning rate.
        hyper: hyperparameters by mechanism, as in `OFF`.

    Returns:
        The chain.
    """
    return bf.chain(
        partial(l2_init, **hyper["l2_init"]),
        partial(bf.crystallize, **hyper["crystallize"]),
        *([bf.adam()] if optimizer == "adam" else []),
        partial(bf.fuzzy_learning_rates, **hyper["fuzzy_learning_rates"]),
        bf.descend(lr),
        bf.where(_is_hidden, partial(bf.synaptic_scaling, **hyper["synaptic_scaling"])),
    )


def make_periodic_chain(hyper: Hyper, *, redraws: bool) -> bf.Chain:
    """What happens once in a period, after the step.

    Args:
        hyper: hyperparameters by mechanism, as in `OFF`.
        redraws: whether synapses are re-drawn; Adam then counts the steps of each, which doubles its cost.

    Returns:
        The chain.
    """
    random_turnover = partial(bf.rejuvenate_weights, selection="random", **hyper["random_turnover"])
    redrawing = [
        partial(bf.rejuvenate_weights, **hyper["rejuvenate_weights"]),
        bf.named("random_turnover", random_turnover),
    ]
    return bf.chain(age, *(redrawing if redraws else []), partial(shrink_and_perturb, **hyper["shrink_and_perturb"]))


@bf.rule(phase="weights", memory={"periods": 0.0})
def age(params: Leaves, grads: Leaves, state: BioState, *, name: str) -> tuple[Leaves, Leaves, BioState]:
    """Counts the periods that each synapse has lived; a synapse of age 0 after a period was re-drawn in it."""
    periods = {path: leaf + 1 for path, leaf in state.slots[name]["periods"].items()}
    return params, grads, state.with_slot(name, periods=periods)


def _is_hidden(path: str, leaf: Any) -> bool:
    return path in ("0.weight", "2.weight")


def hyperparameters(arm: str, setting: Mapping[str, Any]) -> Hyper:
    """The hyperparameters of an arm in one setting, all other mechanisms off.

    Args:
        arm: one of `ARMS`.
        setting: hyperparameters of its mechanism, by name.

    Returns:
        Hyperparameters by mechanism, as in `OFF`.
    """
    mechanism = ARMS[arm]
    return {rule: {**off, **(setting if rule == mechanism else {})} for rule, off in OFF.items()}
