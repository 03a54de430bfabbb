"""Rejuvenation: weak synapses die, new ones take their place.

Spines appear and vanish all through life, and small ones vanish first. A synapse dies when a random threshold exceeds
its weight; a new one of random weight and sign grows at its site, with M the largest weight of the leaf:

    tau ~ |N(0, (M / dre)^2)|;    w <- U(-M, M)  where tau > |w|

so that P(death | w) = erfc(|w| dre / (M sqrt 2)). A new synapse is new in everything: its moments, counts and ages
start again, and its learning rate is the one it was born with. Under Dale's principle it takes its neuron's sign:
w <- |U(-M, M)| s, with s = state.polarity.
"""

import math

import torch
from torch import Tensor

from biofunc.decorator import GIVEN, rule
from biofunc.noise import Noise
from biofunc.reductions import finite_max, finite_mean
from biofunc.rule import Hyperparameter
from biofunc.sharding import placed, whole
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["rejuvenate_weights"]


@rule(
    phase="weights",
    ranges={"dre": "(0, inf]", "rate": "[0, 1)"},
    choices={"selection": ("small", "random")},
    redraws=True,
)
def rejuvenate_weights(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    dre: Hyperparameter = 8.0,
    rate: Hyperparameter | None = None,
    selection: str = "small",
    noise: Noise = GIVEN,
) -> tuple[Leaves, Leaves, BioState]:
    """Replaces weak synapses by new random ones: `w <- U(-M, M)` where `|N(0, (M / dre)^2)| > |w|`, M = max |w|.

    Args:
        params: tree of parameters.
        grads: tree like params.
        state: made with this rule if other rules of it keep counts; re-drawn synapses start anew in it.
        dre: a synapse dies if |w| is below a draw of standard deviation M / dre, > 0; larger: fewer die; inf turns
            the rule off. At 8, 10 % of uniform and some 30 % of normal weights die per call.
        rate: expected share of a leaf's synapses that die per call, in [0, 1); replaces dre. The share n rate is
            rounded up or down at random, and the synapses with the smallest |w| / |z|, z ~ N(0, 1), die: the same
            preference as with dre, whatever the distribution of weights. 0 turns the rule off. Sorts the leaf; each of
            the processes that share one gathers it for that.
        selection: "small": weak synapses die first; "random": any synapse, at the same expected turnover: the control
            that shows whether weakness matters.

    Returns:
        New params, grads as given, and the state in which new synapses have restarted.

    Raises:
        ValueError, TypeError: a number out of its range, or an unknown selection.

    Phase: weights.

    Noise: per synapse one normal (for "random" a uniform) and one uniform for the new weight; one uniform per leaf.

    Source: Hofmann, Becker, Tetzlaff, Mäder 2025, doi 10.1038/s41467-025-60078-9, with the rule of the authors' code
    (uniform new weights); the biology: Yasumatsu et al. 2008, doi 10.1523/JNEUROSCI.0603-08.2008.

    Differs: rate and "random" are new; the state of a re-drawn synapse restarts; M leaves out weights that are not
    finite, which never die; a new synapse of a neuron with a polarity has its sign.
    """
    small = selection == "small"
    first, new, coin = noise.draw(params, "normal" if small else "uniform", "uniform", "coin")
    weights: Leaves = {}
    redrawn: Leaves = {}
    for path, w in params.items():
        size = w.abs()
        largest = finite_max(size)
        if rate is not None:
            frailty = (size + _tie_break(largest)) / first[path].abs() if small else first[path]
            dies = _smallest(frailty, rate, coin[path]) & (size < torch.inf)
        elif small:  # False where w is NaN or infinite; in place, in a product that nobody else has
            dies = torch.abs_(first[path] * (largest / dre)) > size
        else:
            share = finite_mean(torch.erfc(size * (dre / (largest * math.sqrt(2)))))
            dies = (first[path] < share) & (size < torch.inf)
        redrawn[path] = dies
        grown = largest * (2 * new[path] - 1)
        if path in state.polarity:
            grown = grown.abs() * state.polarity[path]
        weights[path] = torch.where(dies, grown, w)
    return weights, grads, state.restart(redrawn)


def _tie_break(largest: Tensor) -> Tensor:
    """A size far below all weights: synapses of weight 0 are ranked by chance, not by their place in the leaf."""
    return largest * torch.finfo(largest.dtype).eps + torch.finfo(largest.dtype).tiny


def _smallest(values: Tensor, rate: float | Tensor, coin: Tensor) -> Tensor:
    """Mask of the smallest n rate of n values, rounded up with their fraction as probability."""
    rate = rate.double() if isinstance(rate, Tensor) else rate
    number = torch.floor(values.numel() * rate + coin.double())  # float32 counts to 2^24 only
    order = whole(values).flatten().argsort()
    chosen = torch.arange(values.numel(), device=values.device) < number
    return placed(torch.empty_like(order, dtype=torch.bool).scatter(0, order, chosen).reshape(values.shape), values)
