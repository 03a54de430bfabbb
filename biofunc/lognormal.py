"""Log-normal rejuvenation: weak synapses die, and those that follow are of the sizes that synapses have.

The sizes of cortical synapses are log-normal: many small ones, few large ones. Here a synapse dies with a probability
that falls with its size, and a new one takes the sign of the old and a size from the log-normal distribution that has
the mean and the standard deviation of the sizes of its leaf:

    P(death | w) = exp(-dre |w| / sd(w));    ln |w_new| ~ N(mu, (spread sigma)^2)
    sigma^2 = ln(1 + sd(|w|)^2 / mean(|w|)^2),    mu = ln mean(|w|) - (spread sigma)^2 / 2
"""

import torch

from biofunc.decorator import GIVEN, rule
from biofunc.noise import Noise
from biofunc.reductions import finite_mean, finite_means
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["rejuvenate_weights_lognormal"]


@rule(phase="weights", ranges={"dre": "(0, inf]", "spread": "[0, inf)"}, redraws=True)
def rejuvenate_weights_lognormal(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    dre: Hyperparameter = 8.0,
    spread: Hyperparameter = 1.0,
    noise: Noise = GIVEN,
) -> tuple[Leaves, Leaves, BioState]:
    """Replaces weak synapses by new ones of log-normal size and the same sign.

        dies with probability exp(-dre |w| / sd(w));    |w_new| log-normal with the mean of |w| in its leaf

    Args:
        params: tree of parameters.
        grads: tree like params.
        state: made with this rule if other rules of it keep counts; re-drawn synapses start anew in it.
        dre: a synapse of size sd(w) / dre dies with probability 1 / e, > 0; larger: fewer die; inf turns the rule off.
        spread: width of the new sizes in units of the leaf's own, >= 0; 1: mean and standard deviation of |w| are those
            of the leaf; 0: all new synapses are of mean size.

    Returns:
        New params, grads as given, and the state in which new synapses have restarted.

    Raises:
        ValueError, TypeError: a number out of its range.

    Phase: weights.

    Noise: per synapse one uniform (death) and one normal (size).

    Source: pytorch_bio_transformations 0.0.5, `rejuvenate_weights`; the biology: Loewenstein, Kuras, Rumpel 2011,
    J. Neurosci. 31(26):9481.

    Differs: the original takes the moments of w instead of |w|, whose mean is near 0 in most layers, so that its new
    weights are positive and vanish (median 1e-8); it clamps all weights to [-1, 1], halves sigma, and keeps optimizer
    moments. Here the sign stays, no other weight changes, the mean size of new synapses is that of the leaf, and
    weights that are not finite neither count nor die. A synapse of weight 0 has no sign; its neuron's
    polarity, or else chance, gives one to its heir.
    """
    death, z = noise.draw(params, "uniform", "normal")
    weights: Leaves = {}
    redrawn: Leaves = {}
    for path, w in params.items():
        size = w.abs()
        mean, mean_of_w = finite_means(size, w)
        # Squares may overflow, each at synapses of its own
        variance_of_size = finite_mean((size - mean) ** 2)
        deviation = finite_mean((w - mean_of_w) ** 2).sqrt()
        # Never true where w is NaN or infinite. exp_: in place, in values that nobody else has
        dies = (death[path] < torch.exp_(-dre * size / deviation)) & (deviation > 0)
        sigma = spread * torch.log1p(variance_of_size / mean**2).sqrt()
        new = mean * torch.exp_(sigma * z[path] - sigma * sigma / 2)
        redrawn[path] = dies
        sign = state.polarity[path] if path in state.polarity else torch.where(w == 0, z[path], w)
        weights[path] = torch.where(dies, torch.copysign(new, sign), w)
    return weights, grads, state.restart(redrawn)
