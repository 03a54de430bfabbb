"""The step itself: parameters move against the descent direction."""

from typing import Any

from biofunc.decorator import rule
from biofunc.rule import Hyperparameter, Rule, as_rule
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["descend"]


def descend(lr: Hyperparameter) -> Rule:
    """Makes the rule that moves parameters: `w <- w - lr g`. Every leaf moves, biases too.

    Args:
        lr: learning rate, >= 0; a number, a 0-d tensor or a schedule; 0 moves nothing.

    Returns:
        The rule, for `chain`. Rules behind it see the moved parameters.

    Raises:
        ValueError, TypeError: `lr` out of its range.

    Phase: descend.

    Source: gradient descent, Cauchy 1847, Comptes rendus 25:536.

    Differs: nothing.
    """
    return as_rule(_descend).bind(lr=lr)


def refuse_lr(name: str, lr: Any) -> None:
    """Refuses the learning rate, which belongs to `descend`, where an optimizer is given it.

    Args:
        name: of the optimizer, for the message.
        lr: what was given; None if nothing was.

    Raises:
        TypeError: it was given.
    """
    if lr is not None:
        raise TypeError(
            f"{name} takes no lr, given as {lr!r}: it makes a direction, and the rate belongs to the rule that moves "
            f"parameters, bf.chain(bf.{name}(), bf.descend({lr!r}))"
        )


@rule(phase="descend", ranges={"lr": "[0, inf)"}, every_leaf=True)
def _descend(params: Leaves, grads: Leaves, state: BioState, *, lr: float = 0.0) -> tuple[Leaves, Leaves, BioState]:
    return {path: w - lr * grads[path] for path, w in params.items()}, grads, state
