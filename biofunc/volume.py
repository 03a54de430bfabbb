"""Volume-dependent learning rates: large synapses are stable, small ones are plastic.

The volume of a spine and the strength of its synapse go together, and large spines change less, relative to their
size, than small ones. The volume of a synapse stands for its weight, saturating at 1:

    v = |w| / (|w| + 1),    eta = base_lr exp(-stability_factor v),    factor = |N(eta, (lr_variability eta)^2)|
"""

import torch
from torch import Tensor

from biofunc.decorator import GIVEN, rule
from biofunc.noise import Noise
from biofunc.reductions import finite_mean, finite_min
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["volume_dependent_lr"]


@rule(
    phase="direction",
    ranges={"base_lr": "(0, inf)", "stability_factor": "[0, inf)", "lr_variability": "[0, inf)"},
    choices={"normalise": (True, False)},
)
def volume_dependent_lr(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    base_lr: Hyperparameter = 0.1,
    stability_factor: Hyperparameter = 2.0,
    lr_variability: Hyperparameter = 0.2,
    normalise: bool = False,
    noise: Noise = GIVEN,
) -> tuple[Leaves, Leaves, BioState]:
    """Slows large synapses down: `g <- g |N(eta, (lr_variability eta)^2)|`.

        v = |w| / (|w| + 1),    eta = base_lr exp(-stability_factor v)

    Args:
        params: tree of parameters.
        grads: tree of descent directions, like params.
        state: any state; its key gives the noise.
        base_lr: factor of a synapse of no volume, > 0. Off: base_lr 1 with the two others 0.
        stability_factor: how much faster small synapses learn, as a log ratio over volumes from 0 to 1, >= 0; 0: alike.
        lr_variability: relative standard deviation of the factor from step to step, >= 0; 0: none.
        normalise: divide the factors by their mean over the leaf, so that the rule shapes learning rates and does not
            lower them; base_lr then cancels.

    Returns:
        params and state as given, and the scaled directions.

    Raises:
        ValueError, TypeError: a number out of its range.

    Phase: direction; behind the optimizer under Adam. Before it, where the original has it, the rule is accepted but
    does little: Adam divides out again what lasts in the factor of a synapse, and that is its dependence on size.

    Noise: one normal per synapse and step.

    Source: pytorch_bio_transformations 0.0.5, `volume_dependent_lr`; it is no part of the paper of 2025. The biology:
    Yasumatsu, Matsuzaki, Miyazaki, Noguchi, Kasai 2008, doi 10.1523/JNEUROSCI.0603-08.2008.

    Differs: normalise is new. Without it the defaults multiply the learning rate by 0.1 to 0.037.
    """

    def factor(w: Tensor, z: Tensor) -> Tensor:
        size = w.abs()
        volume = size / (size + 1)
        if normalise:  # a factor common to the leaf cancels; without it a large exponent could make all factors 0
            volume = volume - finite_min(volume)
        # |N(eta, (lr_variability eta)^2)|; exp(…), which eta is proportional to, stands in front. In place, as nobody
        # else has these values
        drawn = torch.exp_(-stability_factor * volume) * torch.abs_(base_lr + base_lr * lr_variability * z)
        scaled: Tensor = drawn / finite_mean(drawn) if normalise else drawn
        return scaled

    (z,) = noise.draw(params, "normal")
    return params, {path: g * factor(params[path], z[path]) for path, g in grads.items()}, state
