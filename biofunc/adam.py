"""Adam and AdamW, as rules that turn gradients into an update direction."""

import torch
from torch import Tensor

from biofunc.bias_correction import bias_correction
from biofunc.decorator import rule
from biofunc.descend import refuse_lr
from biofunc.rule import Hyperparameter, Rule, as_rule, named
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["adam", "adamw"]


def adam(
    lr: None = None,
    *,
    beta1: Hyperparameter = 0.9,
    beta2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 0.0,
) -> Rule:
    """Makes the Adam rule: direction `m / (sqrt(v) + eps)` with the bias-corrected moments m of g and v of g^2.

    `chain(adam(), descend(1e-3))` computes what `torch.optim.Adam(lr=1e-3)` does; the learning rate is that
    of `descend`.

    Args:
        lr: never given; it is here so that the error says where the learning rate belongs, to `descend`.
        beta1: decay of the mean gradient, in [0, 1).
        beta2: decay of the mean squared gradient, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: L2 penalty, >= 0, added to the gradient; 0: none.

    Returns:
        The rule, for `chain`. Where a rule of the chain re-draws synapses, each synapse counts its own steps: its
        moments and their bias correction restart together.

    Raises:
        ValueError, TypeError: a number out of its range, or an `lr`.

    Phase: optimizer.

    Source: Kingma, Ba 2015, arXiv 1412.6980, algorithm 1.

    Differs: nothing, but for what is said of re-drawn synapses.
    """
    refuse_lr("adam", lr)
    return as_rule(_adam).bind(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)


def adamw(
    lr: None = None,
    *,
    beta1: Hyperparameter = 0.9,
    beta2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    weight_decay: Hyperparameter = 1e-2,
) -> Rule:
    """Makes the AdamW rule: Adam's direction of the bare gradient, plus `weight_decay w`.

    `chain(adamw(), descend(1e-3))` computes what `torch.optim.AdamW(lr=1e-3)` does; the learning rate is
    that of `descend`.

    Args:
        lr: never given; it is here so that the error says where the learning rate belongs, to `descend`.
        beta1: decay of the mean gradient, in [0, 1).
        beta2: decay of the mean squared gradient, in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled decay per unit of learning rate, >= 0; 0: none.

    Returns:
        The rule, for `chain`; it counts steps as `adam` does.

    Raises:
        ValueError, TypeError: a number out of its range, or an `lr`.

    Phase: optimizer.

    Source: Loshchilov, Hutter 2019, arXiv 1711.05101, algorithm 2.

    Differs: nothing, but for what is said of re-drawn synapses.
    """
    refuse_lr("adamw", lr)
    rule = named("adamw", _adam)
    return rule.bind(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, decoupled=True)


def _moments(params: Leaves, state: BioState, *, redraws: bool, name: str) -> BioState:
    # state.step is 0, and batched if anything is: so are the moments
    zeros = {path: torch.zeros_like(w) + state.step.to(w.device, w.dtype) for path, w in params.items()}
    counts = {
        path: zero.clone() if redraws and path in state.plasticity else state.step.to(zero.device, zero.dtype)
        for path, zero in zeros.items()
    }
    return state.with_slot(name, mean=zeros, square={p: z.clone() for p, z in zeros.items()}, count=counts)


@rule(
    phase="optimizer",
    ranges={"beta1": "[0, 1)", "beta2": "[0, 1)", "eps": "[0, inf)", "weight_decay": "[0, inf)"},
    init=_moments,
    memory={"mean": 0.0, "square": 0.0, "count": 0.0},
    scale_free=True,
    every_leaf=True,
)
def _adam(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    name: str,
) -> tuple[Leaves, Leaves, BioState]:
    def decay(tree: Leaves) -> Leaves:
        return {path: leaf + weight_decay * params[path] for path, leaf in tree.items()}

    def direction(m: Tensor, v: Tensor, t: Tensor) -> Tensor:
        # m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        return m / bias_correction(beta1, t) / (_root(v / bias_correction(beta2, t)) + eps)

    slot = state.slots[name]
    grads = grads if decoupled else decay(grads)
    mean = {path: beta1 * slot["mean"][path] + (1 - beta1) * g for path, g in grads.items()}
    square = {path: beta2 * slot["square"][path] + (1 - beta2) * g * g for path, g in grads.items()}
    count = {path: slot["count"][path] + 1 for path in grads}
    directions = {path: direction(mean[path], square[path], count[path]) for path in grads}
    state = state.with_slot(name, mean=mean, square=square, count=count)
    return params, decay(directions) if decoupled else directions, state


def _root(v: Tensor) -> Tensor:
    """Square root whose derivative at 0 is 0, not infinity: synapses without gradient leave meta-gradients finite."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1.0).sqrt(), v)
