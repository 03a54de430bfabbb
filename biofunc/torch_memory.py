"""What a torch.optim optimizer remembers about a synapse, seen as a slot of the state.

A re-drawn synapse starts anew. For the time in which weights may be re-drawn, the weight-shaped tensors that a torch
optimizer keeps stand in the state like the memory of a rule, so that `BioState.restart` renews them like any other.

Adam divides its moments by 1 - beta^t with one count t per tensor: a young synapse in an old tensor would move by 3 to
6 learning rates. Its own age k takes the place of t:

    update = lr m / (1 - beta1^k) / (sqrt(v / (1 - beta2^k)) + eps)  [+ lr weight_decay w with decoupled decay]
"""

from typing import Any

import torch
from torch import Tensor, nn, optim

from biofunc.rule import compute_dtype
from biofunc.state import BioState
from biofunc.trees import Leaves

SLOT = "torch.optim"

SCALE_FREE = (
    optim.Adadelta,
    optim.Adafactor,
    optim.Adagrad,
    optim.Adam,
    optim.Adamax,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Rprop,
)
"""Optimizers that divide constant factors of a synapse's gradient out again."""

_FRESH = {"sum": "initial_accumulator_value", "step_size": "lr"}
"""Entries that do not start at 0, with the option that says where they start: Adagrad, Rprop."""


def counts_age(optimizer: optim.Optimizer) -> bool:
    """Whether the update of a re-drawn synapse is corrected for its age.

    Args:
        optimizer: of torch.optim.

    Returns:
        Whether it is Adam or AdamW.
    """
    return isinstance(optimizer, optim.Adam | optim.AdamW)


def unborn(params: Leaves) -> Leaves:
    """Step of the optimizer at which each synapse was re-drawn; 0: it has been there from the start."""
    return {path: torch.zeros_like(p, dtype=compute_dtype(p)) for path, p in params.items()}


def groups_of(optimizer: optim.Optimizer, params: dict[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """The parameter group of each path.

    Args:
        optimizer: of torch.optim.
        params: parameters by path.

    Returns:
        Groups by path, of those parameters that the optimizer has.
    """
    by_id = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {path: by_id[id(p)] for path, p in params.items() if id(p) in by_id}


def expose(optimizer: optim.Optimizer, params: dict[str, nn.Parameter], state: BioState) -> BioState:
    """The state with a slot that shows the weight-shaped memory of the optimizer, and each synapse's age."""
    entries: dict[str, Leaves] = {}
    fresh: dict[str, float] = {}
    groups = groups_of(optimizer, params)
    for path, group in groups.items():
        p = params[path]
        number = [group is other for other in optimizer.param_groups].index(True)
        for name, kept in optimizer.state.get(p, {}).items():
            if isinstance(kept, Tensor) and kept.shape == p.shape and kept.dim():
                entry = f"{name} of group {number}"
                entries.setdefault(entry, {})[path] = kept
                fresh[entry] = float(group[_FRESH[name]]) if name in _FRESH else 0.0
    born = state.slots.get(SLOT, {}).get("born", {})
    ages = {path: _count(optimizer, params[path]) - born[path] for path in params if path in born}
    if isinstance(optimizer, optim.LBFGS):
        ages = {path: torch.ones_like(p) for path, p in params.items()}
    entries["age"], fresh["age"] = ages, 0.0
    shown = state.with_slot(SLOT, **entries)
    return shown.replace(fresh=(*state.fresh, *[(SLOT, entry, value) for entry, value in fresh.items()]))


def take_back(
    optimizer: optim.Optimizer, params: dict[str, nn.Parameter], shown: BioState, new: BioState, state: BioState
) -> BioState:
    """Writes what was renewed since `expose` into the optimizer; the new state as it is kept from step to step."""
    kept = state.slots.get(SLOT, {})
    ages = new.slots[SLOT]["age"]
    for entry, leaves in new.slots[SLOT].items():
        for path, leaf in leaves.items():
            if leaf is not shown.slots[SLOT][entry][path] and entry not in ("age", "born"):
                optimizer.state[params[path]][entry.partition(" of group ")[0]].copy_(leaf)
    if isinstance(optimizer, optim.LBFGS):
        redrawn = [age for path, age in ages.items() if age is not shown.slots[SLOT]["age"][path]]
        if any((age == 0).any() for age in redrawn):  # its curvature was measured with the synapses that are gone
            next(iter(optimizer.state.values()))["n_iter"] = 0
    elif kept:
        changed = {path: age for path, age in ages.items() if age is not shown.slots[SLOT]["age"][path]}
        born = {path: _count(optimizer, params[path]) - age for path, age in changed.items()}
        kept = {"born": {**kept["born"], **born}}
    slots = {name: slot for name, slot in new.slots.items() if name != SLOT}
    return new.replace(slots={**slots, SLOT: kept} if kept else slots, fresh=state.fresh)


def adam_update(group: dict[str, Any], memory: dict[str, Any], before: Tensor, born: Tensor) -> Tensor:
    """Adam's update of a tensor whose synapses have ages of their own.

    Args:
        group: the parameter group.
        memory: what the optimizer keeps of the parameter, after the step.
        before: the parameter before the step.
        born: step of the optimizer at which each synapse was re-drawn.

    Returns:
        What the step takes off the parameter, decoupled weight decay included, in its compute dtype.
    """
    dtype = compute_dtype(before)
    beta1, beta2 = group["betas"]
    # Below 1 only when the optimizer has loaded a state from before the re-drawing
    age = (memory["step"].to(dtype) - born).clamp(min=1)  # a step on the CPU stays there: the device need not wait
    square = memory["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].to(dtype)
    mean = memory["exp_avg"].to(dtype) / (1 - beta1**age)
    update: Tensor = group["lr"] * mean / ((square / (1 - beta2**age)).sqrt() + group["eps"])
    decoupled = group.get("decoupled_weight_decay", False)
    return update + group["lr"] * group["weight_decay"] * before.to(dtype) if decoupled else update


def _count(optimizer: optim.Optimizer, p: nn.Parameter) -> Any:
    step: Any = optimizer.state.get(p, {}).get("step", 0)
    return step.to(compute_dtype(p)) if isinstance(step, Tensor) else step
