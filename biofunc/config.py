"""Settings under the names of pytorch_bio_transformations."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from biofunc import distributions
from biofunc.crystallize import crystallize
from biofunc.fuzzy import fuzzy_learning_rates
from biofunc.rejuvenate import rejuvenate_weights
from biofunc.rule import Hyperparameter, as_rule
from biofunc.temporal import temporal_learning_rates
from biofunc.volume import volume_dependent_lr

__all__ = ["BioConfig"]

MEANINGS: dict[str, tuple[Any, str]] = {
    "fuzzy_learning_rate_factor_nu": (fuzzy_learning_rates, "nu"),
    "fuzzy_lr_min": (fuzzy_learning_rates, "rate_min"),
    "fuzzy_lr_max": (fuzzy_learning_rates, "rate_max"),
    "fuzzy_lr_decay": (temporal_learning_rates, "decay"),
    "dampening_factor": (crystallize, "dampening_factor"),
    "crystal_thresh": (crystallize, "crystal_thresh"),
    "rejuvenation_parameter_dre": (rejuvenate_weights, "dre"),
    "base_lr": (volume_dependent_lr, "base_lr"),
    "stability_factor": (volume_dependent_lr, "stability_factor"),
    "lr_variability": (volume_dependent_lr, "lr_variability"),
}
"""The rule and keyword that a field sets."""

MECHANISMS = (
    "crystallize",
    "volume_dependent_lr",
    "fuzzy_learning_rates",
    "rejuvenate_weights",
    "rejuvenate_weights_lognormal",
)

DYNAMIC = ("temporal", "activity")
DISTRIBUTIONS = (*distributions.NAMED, "layer_adaptive", *DYNAMIC)

_ALIASES = {"gamma": "weight_splitting_Gamma", "learning_rate": "lr", "seed": "key"}
"""What people call a setting of convert elsewhere."""

_INTEGERS = {
    "weight_splitting_Gamma": 0,
    "fuzzy_lr_update_freq": 1,
    "fuzzy_lr_layer_index": -1,
    "fuzzy_lr_total_layers": -1,
    "rejuvenation_period": 1,
}
_FLAGS = ("fuzzy_lr_dynamic", "apply_dales_principle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BioConfig:
    """Settings of `convert`, under the names of pytorch_bio_transformations; frozen.

    `BioConfig(**settings)` reads a dict (also `original_config._asdict()`), `dataclasses.replace(config, base_lr=0.05)`
    changes some. Where a rule takes tensors or schedules, so does its field.

    Attributes:
        mechanisms: what learning consists of beside the optimizer, as the calls in the original's training loop:
            "volume_dependent_lr", "fuzzy_learning_rates", "crystallize", and "rejuvenate_weights" or
            "rejuvenate_weights_lognormal". Their order does not matter: `convert` knows where each belongs.
        fuzzy_learning_rate_factor_nu: spread of the learning rates, in [0, 1); 0: all alike.
        fuzzy_lr_distribution: as `fuzzy_learning_rates` takes it, or "layer_adaptive", "temporal" or "activity".
        fuzzy_lr_min: smallest rate, in [0, 1].
        fuzzy_lr_max: largest rate, at least 1.
        fuzzy_lr_dynamic: True with the distributions "temporal" and "activity", which change while learning; of no
            effect with others, which do not.
        fuzzy_lr_decay: share of a rate's distance to 1 that is left after an update ("temporal"), in [0, 1].
        fuzzy_lr_update_freq: steps from one update of the rates to the next ("temporal"), at least 1; with "activity"
            they are drawn at every 10th step.
        fuzzy_lr_layer_index: not used, the order of the layers says it; so that the original's settings can be read.
        fuzzy_lr_total_layers: not used either.
        dampening_factor: factor on the rate of a synapse that has settled, in (0, 1]; 1: off.
        crystal_thresh: relative gradient below which it has settled, >= 0.
        rejuvenation_parameter_dre: the larger, the fewer synapses die, > 0; inf: off.
        rejuvenation_period: steps from one rejuvenation to the next, at least 1. The original leaves it to the loop and
            suggests an epoch.
        weight_splitting_Gamma: contacts per connection; 0 or 1: off.
        weight_splitting_skip: layers that stay whole: "last", globs on their names, or None, as for `split_synapses`.
        weight_splitting_activation_function: applied to each contact; a function or module without parameters.
        apply_dales_principle: signs of the majority are imposed at the start and enforced at each step.
        base_lr: factor on the learning rate of a synapse of no volume, > 0.
        stability_factor: how much slower large synapses learn, >= 0; 0: alike.
        lr_variability: relative standard deviation of the factor, >= 0; 0: none.

    Raises:
        TypeError: a name that is none, with the nearest one that is; a value of another type.
        ValueError: a value out of its range, or a combination that has no meaning.

    Differs: values that turn a mechanism off are allowed; the bounds, the decay and the period are checked too; the
    original checks when converting alone, with assertions.
    """

    mechanisms: tuple[str, ...] = (
        "crystallize",
        "volume_dependent_lr",
        "fuzzy_learning_rates",
        "rejuvenate_weights",
    )
    fuzzy_learning_rate_factor_nu: Hyperparameter = 0.16
    fuzzy_lr_distribution: str | Callable[..., Any] = "uniform"
    fuzzy_lr_min: Hyperparameter = 0.5
    fuzzy_lr_max: Hyperparameter = 2.0
    fuzzy_lr_dynamic: bool = False
    fuzzy_lr_decay: Hyperparameter = 0.9995
    fuzzy_lr_update_freq: int = 100
    fuzzy_lr_layer_index: int = -1
    fuzzy_lr_total_layers: int = -1
    dampening_factor: Hyperparameter = 0.6
    crystal_thresh: Hyperparameter = 4.5e-5
    rejuvenation_parameter_dre: Hyperparameter = 8.0
    rejuvenation_period: int = 100
    weight_splitting_Gamma: int = 0  # noqa: N815, the name that the original's users know
    weight_splitting_skip: str | Sequence[str] | None = "last"
    weight_splitting_activation_function: Callable[..., Any] | None = None
    apply_dales_principle: bool = False
    base_lr: Hyperparameter = 0.1
    stability_factor: Hyperparameter = 2.0
    lr_variability: Hyperparameter = 0.2

    def __new__(cls, *positional: Any, **settings: Any) -> "BioConfig":
        if positional:
            raise TypeError("BioConfig takes settings by name: BioConfig(**settings)")
        check_settings(settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field, (made, keyword) in MEANINGS.items():
            rule = as_rule(made)
            at_init = (field,) if keyword in rule.at_init else ()
            checker = dataclasses.replace(
                rule, name="BioConfig", ranges={field: rule.ranges[keyword]}, at_init=at_init, choices={}
            )
            checker.check_value(field, getattr(self, field))
        for field, least in _INTEGERS.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"BioConfig: {field} is {value!r}; it must be an integer")
            if value < least:
                raise ValueError(f"BioConfig: {field} is {value}; it must be at least {least}")
        for field in _FLAGS:
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"BioConfig: {field} is {getattr(self, field)!r}; it must be True or False")
        if not isinstance(self.mechanisms, Iterable):
            raise TypeError(f"BioConfig: mechanisms is {self.mechanisms!r}; it must be a tuple of names")
        if isinstance(self.mechanisms, str):
            raise TypeError(f"BioConfig: mechanisms is {self.mechanisms!r}; give several, ({self.mechanisms!r},)")
        object.__setattr__(self, "mechanisms", tuple(self.mechanisms))
        check_names(self.mechanisms, MECHANISMS, "mechanisms has no")
        if {"rejuvenate_weights", "rejuvenate_weights_lognormal"} <= set(self.mechanisms):
            raise ValueError(
                "BioConfig: mechanisms has rejuvenate_weights and rejuvenate_weights_lognormal; use one of the two"
            )
        distribution, gamma = self.fuzzy_lr_distribution, self.weight_splitting_Gamma
        if isinstance(distribution, str):
            distribution = str.__str__(distribution)  # of the original's Enum, whose members are strings
            object.__setattr__(self, "fuzzy_lr_distribution", distribution)
            check_names([distribution], DISTRIBUTIONS, "fuzzy_lr_distribution has no")
        elif isinstance(distribution, type) or not callable(distribution):
            raise TypeError(f"BioConfig: fuzzy_lr_distribution is {distribution!r}; it must be a name or a function")
        skip = self.weight_splitting_skip
        if skip is not None and not (isinstance(skip, Sequence) and all([isinstance(glob, str) for glob in skip])):
            raise TypeError(f"BioConfig: weight_splitting_skip is {skip!r}; give 'last', names of layers, or None")
        if skip is not None and not isinstance(skip, str):
            object.__setattr__(self, "weight_splitting_skip", tuple(skip))
        activation = self.weight_splitting_activation_function
        if activation is not None and (isinstance(activation, type) or not callable(activation)):
            raise TypeError(
                f"BioConfig: weight_splitting_activation_function is {activation!r}; give a function of a tensor, "
                "torch.relu or torch.nn.ReLU()"
            )
        if distribution in DYNAMIC and not self.fuzzy_lr_dynamic:
            raise ValueError(
                f"BioConfig: fuzzy_lr_distribution is '{distribution}' and fuzzy_lr_dynamic False, so that the rates "
                "would never change; set fuzzy_lr_dynamic=True, or another distribution"
            )
        if distribution in DYNAMIC and not isinstance(self.fuzzy_lr_min, Tensor) and not self.fuzzy_lr_min:
            raise ValueError(f"BioConfig: fuzzy_lr_min is 0; with the distribution '{distribution}' it lies in (0, 1]")
        if self.apply_dales_principle and gamma > 1:
            raise ValueError(
                f"BioConfig: apply_dales_principle with weight_splitting_Gamma={gamma} would give the contacts of one "
                "neuron signs of their own in the layer that follows; use one of the two"
            )


def check_settings(given: Iterable[str], *others: str) -> None:
    """Raises a TypeError for the first name that is no setting, and says what a rule's keyword is called here."""
    known = [field.name for field in dataclasses.fields(BioConfig)]
    here = {keyword: field for field, (_, keyword) in MEANINGS.items()} | _ALIASES
    for name in given:
        if name in here and name not in known:
            raise TypeError(f"BioConfig: there is no setting '{name}'; it is called '{here[name]}' here")
    check_names(given, [*known, *others])


def check_names(given: Iterable[str], known: Sequence[str], complaint: str = "there is no setting") -> None:
    """Raises a TypeError for the first unknown name, with the known one that is nearest."""
    for name in given:
        if name not in known:
            lower = str(name).lower()
            close = [lower] if lower in known else difflib.get_close_matches(lower, known, 1, 0.6)
            hint = f"did you mean '{close[0]}'?" if close else f"they are: {', '.join(known)}"
            raise TypeError(f"BioConfig: {complaint} '{name}'; {hint}")
