"""biofunc: synapses for torch.func.

Pure functions `rule(params, grads, state) -> (params, grads, state)` that make learning more like a brain's, composable
with `functional_call`, `grad`, `vmap` and `torch.compile`.
"""

from typing import TYPE_CHECKING, Any

from biofunc import distributions, ensemble, measure, random, schedules
from biofunc.activity import record_activity
from biofunc.activity_rates import activity_dependent_rates
from biofunc.adam import adam, adamw
from biofunc.attach import attach
from biofunc.attachment import Attachment
from biofunc.chain import Chain, chain, init
from biofunc.checkpoint import load, save
from biofunc.config import BioConfig
from biofunc.convert import Converted, convert
from biofunc.crystallize import crystallize
from biofunc.dale import enforce_dales_principle, impose_dales_principle, presynaptic_axes
from biofunc.decorator import rule
from biofunc.descend import descend
from biofunc.every import every
from biofunc.fuzzy import fuzzy_learning_rates
from biofunc.lognormal import rejuvenate_weights_lognormal
from biofunc.penalties import l1_penalty
from biofunc.rejuvenate import rejuvenate_weights
from biofunc.rule import Hyperparameter, Rule, named
from biofunc.scaling import synaptic_scaling
from biofunc.selection import layers
from biofunc.sgd import sgd
from biofunc.splitting import split_synapses
from biofunc.state import BioState
from biofunc.temporal import temporal_learning_rates
from biofunc.volume import volume_dependent_lr
from biofunc.where import where

if TYPE_CHECKING:
    from biofunc import plot as plot
else:

    def __getattr__(name: str) -> Any:
        """Loads `biofunc.plot`, and with it matplotlib, when it is first used."""
        if name != "plot":
            raise AttributeError(f"module 'biofunc' has no attribute '{name}'")
        import importlib

        return importlib.import_module("biofunc.plot")


__version__ = "0.1.0"

__all__ = [
    "Attachment",
    "BioConfig",
    "BioState",
    "Chain",
    "Converted",
    "Hyperparameter",
    "Rule",
    "activity_dependent_rates",
    "adam",
    "adamw",
    "attach",
    "chain",
    "convert",
    "crystallize",
    "descend",
    "distributions",
    "enforce_dales_principle",
    "ensemble",
    "every",
    "fuzzy_learning_rates",
    "impose_dales_principle",
    "init",
    "l1_penalty",
    "layers",
    "load",
    "measure",
    "named",
    "presynaptic_axes",
    "random",
    "record_activity",
    "rejuvenate_weights",
    "rejuvenate_weights_lognormal",
    "rule",
    "save",
    "schedules",
    "sgd",
    "split_synapses",
    "synaptic_scaling",
    "temporal_learning_rates",
    "volume_dependent_lr",
    "where",
]
