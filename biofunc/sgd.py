"""Stochastic gradient descent with momentum, as a rule that turns gradients into an update direction."""

from biofunc.decorator import rule
from biofunc.descend import refuse_lr
from biofunc.rule import Hyperparameter, Rule, as_rule
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["sgd"]


def sgd(
    lr: None = None,
    *,
    momentum: Hyperparameter = 0.0,
    nesterov: bool = False,
    weight_decay: Hyperparameter = 0.0,
) -> Rule:
    """Makes the momentum rule: `m <- momentum m + (g + weight_decay w)`, direction m.

    `chain(sgd(momentum=0.9), descend(0.1))` computes what `torch.optim.SGD(lr=0.1, momentum=0.9)` does; the learning
    rate is that of `descend`, which alone is SGD without momentum.

    Args:
        lr: never given; it is here so that the error says where the learning rate belongs, to `descend`.
        momentum: share of the last direction that is kept, in [0, 1); 0: none.
        nesterov: look ahead: direction `g + momentum m`.
        weight_decay: L2 penalty, >= 0, added to the gradient; 0: none.

    Returns:
        The rule, for `chain`. The momentum of a re-drawn synapse restarts at 0.

    Raises:
        ValueError, TypeError: a number out of its range, or an `lr`.

    Phase: optimizer.

    Source: Sutskever, Martens, Dahl, Hinton 2013, proceedings.mlr.press/v28/sutskever13; the form of torch.optim.SGD.

    Differs: nothing, but for what is said of re-drawn synapses.
    """
    refuse_lr("sgd", lr)
    return as_rule(_sgd).bind(momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)


@rule(
    phase="optimizer",
    ranges={"momentum": "[0, 1)", "weight_decay": "[0, inf)"},
    choices={"nesterov": (True, False)},
    memory={"momentum": 0.0},
    every_leaf=True,
)
def _sgd(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    name: str,
) -> tuple[Leaves, Leaves, BioState]:
    decayed = {path: g + weight_decay * params[path] for path, g in grads.items()}
    velocity = {path: momentum * state.slots[name]["momentum"][path] + g for path, g in decayed.items()}
    direction = {path: decayed[path] + momentum * m for path, m in velocity.items()} if nesterov else dict(velocity)
    return params, direction, state.with_slot(name, momentum=velocity)
