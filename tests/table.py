"""The table of rules: every exported rule has a row here and goes through every law in test_laws.py."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import oracles
import torch

import biofunc as bf
from biofunc.rule import Rule, as_rule


@dataclasses.dataclass(frozen=True)
class Row:
    """What the laws need to know of a rule.

    given: the exported name; make: hyperparameters -> rule; settings: valid hyperparameters, one set per case;
    off: hyperparameters under which the rule is the identity, or None if it has none; at_step: hyperparameters that
    may also be tensors and schedules; oracle: a scalar loop of the formula; reduces: whether it takes means over a
    leaf, which vmap sums in another order; smooth: hyperparameters in which the result is differentiable.
    """

    given: str
    make: Callable[..., Rule]
    settings: tuple[Mapping[str, Any], ...]
    off: Mapping[str, Any] | None
    at_step: tuple[str, ...]
    oracle: Callable[..., Any]
    reduces: bool = False
    smooth: tuple[str, ...] = ()


def _mechanism(function: Any) -> Callable[..., Rule]:
    return lambda **keywords: as_rule(function).bind(**keywords)


def _driven(function: Any) -> Callable[..., Rule]:
    """A rule that is handed activity: here the summed size of a neuron's weights, so that every tree has one."""

    def make(**keywords: Any) -> Rule:
        inner = as_rule(function).bind(**keywords)

        def transform(rule, params, grads, state, given):
            values = {path: w.detach() if isinstance(w, torch.nn.Parameter) else w for path, w in params.items()}
            activity = {path: w.abs().flatten(1).sum(1) for path, w in values.items() if w.dim() >= 2}
            return inner.transform(rule, params, grads, state, {**given, "activity": activity})

        return dataclasses.replace(inner, transform=transform, needs=())

    return make


TABLE = {
    row.given: row
    for row in [
        Row(
            "crystallize",
            _mechanism(bf.crystallize),
            (
                {},
                {"crystal_thresh": 0.5, "dampening_factor": 0.3, "floor": 0.1, "recovery": 0.25},
                {"freeze_silent": True},
            ),
            {"dampening_factor": 1.0},
            ("crystal_thresh", "dampening_factor", "floor", "recovery"),
            oracles.crystallize,
            reduces=True,
            smooth=("dampening_factor", "recovery"),
        ),
        Row(
            "fuzzy_learning_rates",
            _mechanism(bf.fuzzy_learning_rates),
            ({}, {"nu": 0.9, "rate_min": 0.2, "rate_max": 1.5}),
            {"nu": 0.0},
            (),
            oracles.fuzzy_learning_rates,
        ),
        Row(
            "volume_dependent_lr",
            _mechanism(bf.volume_dependent_lr),
            ({}, {"base_lr": 1.5, "stability_factor": 0.7, "lr_variability": 0.4}, {"normalise": True}),
            {"base_lr": 1.0, "stability_factor": 0.0, "lr_variability": 0.0},
            ("base_lr", "stability_factor", "lr_variability"),
            oracles.volume_dependent_lr,
            reduces=True,
            smooth=("base_lr", "stability_factor", "lr_variability"),
        ),
        Row(
            "rejuvenate_weights",
            _mechanism(bf.rejuvenate_weights),
            ({}, {"dre": 2.0, "selection": "random"}, {"rate": 0.3}, {"rate": 0.3, "selection": "random"}),
            {"dre": math.inf},
            ("dre",),
            oracles.rejuvenate_weights,
            reduces=True,
        ),
        Row(
            "rejuvenate_weights_lognormal",
            _mechanism(bf.rejuvenate_weights_lognormal),
            ({}, {"dre": 1.0, "spread": 0.5}),
            {"dre": math.inf},
            ("dre", "spread"),
            oracles.rejuvenate_weights_lognormal,
            reduces=True,
        ),
        Row(
            "temporal_learning_rates",
            _mechanism(bf.temporal_learning_rates),
            ({}, {"nu": 0.5, "decay": 0.7, "renewal": 0.9, "renewal_period": 2.0, "rate_min": 0.7, "rate_max": 1.2}),
            {"nu": 0.0},
            ("decay", "renewal", "rate_min"),
            oracles.temporal_learning_rates,
            smooth=("decay", "renewal"),
        ),
        Row(
            "activity_dependent_rates",
            _driven(bf.activity_dependent_rates),
            ({}, {"nu": 0.5, "gain": 0.9, "rate_min": 0.7, "rate_max": 1.2}),
            {"nu": 0.0},
            ("nu", "gain", "rate_min"),
            oracles.activity_dependent_rates,
            reduces=True,
            smooth=("nu", "gain"),
        ),
        Row(
            "synaptic_scaling",
            _driven(bf.synaptic_scaling),
            ({}, {"target": 0.3, "rate": 0.5, "decay": 0.7}, {"rate": 0.2, "form": "quadratic"}),
            {"rate": 0.0},
            ("rate", "decay"),
            oracles.synaptic_scaling,
            reduces=True,
            smooth=("rate", "decay"),
        ),
        Row(
            "enforce_dales_principle",
            _mechanism(bf.enforce_dales_principle),
            ({}, {"sign": "drawn", "fraction_excitatory": 0.5}, {"axis": "postsynaptic"}),
            None,
            (),
            oracles.enforce_dales_principle,
        ),
        Row(
            "impose_dales_principle",
            _mechanism(bf.impose_dales_principle),
            ({}, {"sign": "drawn", "fraction_excitatory": 0.5}, {"axis": "postsynaptic"}),
            None,
            (),
            oracles.impose_dales_principle,
        ),
        Row(
            "sgd",
            bf.sgd,
            ({}, {"momentum": 0.9, "weight_decay": 0.1}, {"momentum": 0.5, "nesterov": True}),
            {"momentum": 0.0, "weight_decay": 0.0},
            ("momentum", "weight_decay"),
            oracles.sgd,
            smooth=("momentum", "weight_decay"),
        ),
        Row(
            "adam",
            bf.adam,
            ({}, {"beta1": 0.5, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
            None,
            ("beta1", "beta2", "eps", "weight_decay"),
            oracles.adam,
            smooth=("beta1", "beta2", "eps", "weight_decay"),
        ),
        Row(
            "adamw",
            bf.adamw,
            ({}, {"beta1": 0.5, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1}),
            None,
            ("beta1", "beta2", "eps", "weight_decay"),
            oracles.adamw,
            smooth=("beta1", "beta2", "eps", "weight_decay"),
        ),
        Row(
            "descend",
            lambda lr=0.1: bf.descend(lr),
            ({}, {"lr": 0.5}),
            {"lr": 0.0},
            ("lr",),
            oracles.descend,
            smooth=("lr",),
        ),
    ]
}

NOT_RULES = {
    "attach",
    "chain",
    "convert",
    "every",
    "init",
    "l1_penalty",
    "layers",
    "load",
    "named",
    "presynaptic_axes",
    "record_activity",
    "rule",
    "save",
    "split_synapses",
    "where",
}
"""Exported functions that compose, select or make models."""

CASES = [(row, settings) for row in TABLE.values() for settings in row.settings]
IDS = [f"{row.given}-{'-'.join(settings) or 'defaults'}" for row, settings in CASES]
