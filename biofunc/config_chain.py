"""The chain of rules that settings stand for, each mechanism in its place; `convert` learns with it."""

import functools
from collections.abc import Collection
from typing import Any

from torch import nn

from biofunc import distributions
from biofunc.activity_rates import activity_dependent_rates
from biofunc.chain import Chain, chain
from biofunc.config import BioConfig
from biofunc.crystallize import crystallize
from biofunc.dale import enforce_dales_principle, presynaptic_axes
from biofunc.descend import descend
from biofunc.every import every
from biofunc.fuzzy import fuzzy_learning_rates
from biofunc.lognormal import rejuvenate_weights_lognormal
from biofunc.rejuvenate import rejuvenate_weights
from biofunc.rule import Hyperparameter, as_rule
from biofunc.selection import ByPath
from biofunc.splitting import SPLITTABLE
from biofunc.temporal import temporal_learning_rates
from biofunc.volume import volume_dependent_lr
from biofunc.where import where


def chain_of(model: nn.Module, config: BioConfig, paths: list[str], lr: Hyperparameter, optimizer: Any) -> Chain:
    """The chain of the mechanisms that settings use.

    Args:
        model: the module, split if it is to be.
        config: the settings.
        paths: paths of the synapses.
        lr: learning rate, or its schedule.
        optimizer: an optimizer rule.

    Returns:
        The chain.

    Raises:
        TypeError: `optimizer` is no optimizer rule.
    """
    used, bind = config.mechanisms, functools.partial
    rules: list[Any] = []
    if "crystallize" in used:
        thresh, damping = config.crystal_thresh, config.dampening_factor
        rules.append(bind(crystallize, crystal_thresh=thresh, dampening_factor=damping))
    rules.append(_optimizer(optimizer))
    if "volume_dependent_lr" in used:
        names = ("base_lr", "stability_factor", "lr_variability")
        rules.append(bind(volume_dependent_lr, **{name: getattr(config, name) for name in names}))
    if "fuzzy_learning_rates" in used:
        rules += _fuzzy(model, config, paths)
    elif "crystallize" in used:
        rules.append(bind(fuzzy_learning_rates, nu=0))
    rules.append(descend(lr))
    for rejuvenate in (rejuvenate_weights, rejuvenate_weights_lognormal):
        if rejuvenate.__name__ in used:
            bound = bind(rejuvenate, dre=config.rejuvenation_parameter_dre)
            rules.append(every(config.rejuvenation_period, bound))
    if config.apply_dales_principle:
        rules.append(bind(enforce_dales_principle, axis=dale_axes(model)))
    return chain(*rules)


def _optimizer(given: Any) -> Any:
    made = as_rule(given) if not isinstance(given, str) else None
    if made is None or made.phase != "optimizer":
        raise TypeError(f"optimizer is {given!r}; give an optimizer rule, optimizer=bf.adam()")
    return made


_ACTIVITY_PERIOD = 10
"""The original draws the rates anew with a probability of 0.1 at each step."""


def _fuzzy(model: nn.Module, config: BioConfig, paths: list[str]) -> list[Any]:
    """The rule that applies the rates, behind the one that lets them change, if any."""
    nu = config.fuzzy_learning_rate_factor_nu
    bounds = {"rate_min": config.fuzzy_lr_min, "rate_max": config.fuzzy_lr_max}
    bind, distribution = functools.partial, config.fuzzy_lr_distribution
    if distribution == "temporal":
        drift = bind(temporal_learning_rates, nu=nu, decay=config.fuzzy_lr_decay, **bounds)
        return [every(config.fuzzy_lr_update_freq, drift), bind(fuzzy_learning_rates, nu=0)]
    if distribution == "activity":
        recorded = ByPath(frozenset(called_layers(model, paths).values()))
        redraw = every(_ACTIVITY_PERIOD, bind(activity_dependent_rates, nu=nu, **bounds))
        return [where(recorded, redraw), bind(fuzzy_learning_rates, nu=0)]
    if distribution == "layer_adaptive":
        distribution = distributions.layer_adaptive(paths)
    return [bind(fuzzy_learning_rates, nu=nu, distribution=distribution, **bounds)]


def called_layers(model: nn.Module, paths: Collection[str]) -> dict[str, str]:
    """Linear and Conv layers with synapses.

    Left out are those that their owner never calls: MultiheadAttention multiplies by its projection's weight itself.

    Args:
        model: the module.
        paths: paths of the synapses.

    Returns:
        By the layer's name, the path of its weight.
    """
    names = {id(p): path for path, p in model.named_parameters()}
    uncalled = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    return {
        name: names[id(m.weight)]
        for name, m in model.named_modules()
        if isinstance(m, SPLITTABLE) and id(m) not in uncalled and names.get(id(m.weight)) in paths
    }


def dale_axes(model: nn.Module) -> Any:
    """The axes of presynaptic neurons, as the rules of Dale's principle take them.

    Args:
        model: the module.

    Returns:
        By path, `(axis, groups)`; "presynaptic" where no layer of torch says.
    """
    try:
        return presynaptic_axes(model)
    except ValueError:  # no layer of torch: the synapses are those that `where` names, laid out as in Linear
        return "presynaptic"
