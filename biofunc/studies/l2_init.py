"""L2 Init: parameters are pulled back to where they began.

The rival from machine learning against which plasticity mechanisms are measured. A network that has learnt many tasks
ends far from its initial weights, where it learns badly; a penalty on the distance keeps it near:

    loss + strength |w - w0|^2;    g <- g + 2 strength (w - w0)
"""

from biofunc.decorator import GIVEN, rule
from biofunc.rule import Hyperparameter
from biofunc.state import BioState
from biofunc.trees import Leaves

__all__ = ["l2_init"]


def _remember_start(params: Leaves, state: BioState, *, name: str) -> BioState:
    # state.step is 0, and batched if anything is: so is the start
    start = {path: w + state.step.to(w.device, w.dtype) for path, w in params.items()}
    return state.with_slot(name, start=start)


@rule(phase="gradient", ranges={"strength": "[0, inf)"}, init=_remember_start, every_leaf=True)
def l2_init(
    params: Leaves, grads: Leaves, state: BioState, *, strength: Hyperparameter = 1e-3, name: str = GIVEN
) -> tuple[Leaves, Leaves, BioState]:
    """Pulls every parameter towards its initial value: `g <- g + 2 strength (w - w0)`.

    Args:
        params: tree of parameters.
        grads: tree of gradients, like params.
        state: made with this rule; it keeps w0, the parameters that init was given.
        strength: factor of the penalty |w - w0|^2 in the loss, >= 0; 0 turns the rule off.

    Returns:
        params and state as given, and the gradients of the loss with the penalty.

    Raises:
        ValueError, TypeError: the strength out of its range.
        KeyError: the state was made without this rule.

    Phase: gradient. Under Adam the penalty passes through the moments, as in the authors' code.

    Source: Kumar, Marklund, Van Roy 2023, arXiv 2308.11958, and the authors' code.

    Differs: w0 of a re-drawn synapse stays the one that init was given.
    """
    start = state.slots[name]["start"]
    return params, {path: grads[path] + 2 * strength * (w - start[path]) for path, w in params.items()}, state
