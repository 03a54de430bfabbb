"""Gradient noise: the classical defence of a shared gradient, without any biology.

    g <- g + strength rms(g) z,    z ~ N(0, 1)

rms(g) is the root mean square of the leaf, so that a strength means the same for every layer and at every time of
training.
"""

import biofunc as bf
from biofunc.decorator import GIVEN
from biofunc.noise import Noise
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["gradient_noise"]


@bf.rule(phase="direction", ranges={"strength": "[0, inf)"})
def gradient_noise(
    params: Leaves, grads: Leaves, state: BioState, *, strength: Hyperparameter = 0.1, noise: Noise = GIVEN
) -> tuple[Leaves, Leaves, BioState]:
    """Adds noise to the gradient: `g <- g + strength rms(g) z`.

    Args:
        params: tree of parameters.
        grads: tree of descent directions, like params.
        state: any state; its key gives the noise.
        strength: standard deviation of the noise over the root mean square of the leaf, >= 0; 0: none.

    Returns:
        params and state as given, and the noisy directions.

    Raises:
        ValueError, TypeError: strength is out of its range.

    Phase: direction.

    Noise: one normal per synapse and step.

    Source: Zhu, Liu, Han 2019, arXiv 1906.08935, section 5.

    Differs: the noise is relative to the gradient of its leaf; theirs has one size for all.
    """
    (z,) = noise.draw(grads, "normal")
    return params, {path: g + strength * g.square().mean().sqrt() * z[path] for path, g in grads.items()}, state
