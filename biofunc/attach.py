"""The bridge to loops with modules and torch.optim: rules that act at each step of an optimizer.

    gradient rules on .grad;  the optimizer's step;  update rules on (before - after);  weight rules on the weights

The rules of the three places are checked and ordered like those of a chain.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.nn.parameter import is_lazy

from biofunc import torch_memory
from biofunc.adam import adam
from biofunc.attachment import Attachment
from biofunc.chain import Chain, chain, init
from biofunc.descend import descend
from biofunc.rule import Rule, as_rule, named
from biofunc.selection import Selection
from biofunc.sgd import sgd
from biofunc.sharding import groups
from biofunc.wrappers import parallel_wrapper, unwrapped

__all__ = ["attach"]

_PHASES = {"gradient": ("gradient", "direction"), "update": ("direction",), "weight": ("weights",)}
_PLACES = {"gradient": "gradient", "direction": "update", "weights": "weight"}


def attach(
    optimizer: optim.Optimizer,
    model: nn.Module,
    *,
    key: Tensor,
    gradient: Sequence[Any] = (),
    update: Sequence[Any] = (),
    weight: Sequence[Any] = (),
    where: Selection = None,
    **misspelt: Any,
) -> Attachment:
    """Lets rules act at each step of a torch.optim optimizer, in a training loop that stays as it is.

    `optimizer.step()` then computes what the chain of the gradient rules, the optimizer, the update rules, `descend`
    and the weight rules computes; the update is what the optimizer did to a parameter, its learning rate included.
    `.grad` holds after the step what backward left there.

    Gradient rules see unscaled gradients under `torch.amp.GradScaler`, the accumulated ones with gradient accumulation,
    and the averaged ones under DistributedDataParallel. With a closure (LBFGS) they act on the gradients of each
    evaluation, all of which see the state and the noise of the step's beginning, and what the first one makes of the
    state is kept; the update is that of the whole step.

    Args:
        optimizer: any optimizer of torch.optim; schedulers work as ever.
        model: the module of which it trains all or some parameters; plain, compiled, wrapped for data parallelism, or
            sharded by `fully_shard` or `parallelize_module` (make the optimizer after that).
            Paths are the names in its `named_parameters()`, without the prefixes of these wrappers; a tied parameter
            counts once.
        key: from `biofunc.random.key`; the same on all ranks.
        gradient: rules of phase gradient or direction, in order.
        update: rules of phase direction: the place of `fuzzy_learning_rates` under Adam.
        weight: rules of phase weights.
        where: which parameters are synapses, see `Chain.init`.
        misspelt: never given; it is here so that the error names what was meant.

    Returns:
        The Attachment, with `state`, `signal`, `state_dict`, `load_state_dict` and `detach`. Parameters without a
        gradient (frozen, or not used in this step) are left out of the step, with all that is kept about them, as
        torch.optim does. Where a rule re-draws synapses, the optimizer's weight-shaped memory of them restarts. Adam
        and AdamW also count their age, LBFGS restarts as a whole, and in others a count of steps goes on: the first
        move of a new synapse at step 200 is, in learning rates, 1.0 with Adam and Adafactor, 0.4 with RAdam, 0.1 with
        Adamax, and 10 with RMSprop, as at its own start. LBFGS reads curvature off its own moves: update and weight
        rules that act strongly spoil it.

    Raises:
        TypeError: an argument of another kind, or no rule.
        KeyError: `where` is a tree that does not match the parameters.
        ValueError: rules in the wrong place or order, NAdam with rules that re-draw synapses, an optimizer that has
            rules attached already or none of the model's parameters, a layer without shape, or ranks with other keys.
    """
    for name in misspelt:
        known = ("key", "gradient", "update", "weight", "where")
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}=?" if close else f"it takes {', '.join(known)}"
        raise TypeError(f"attach takes no argument '{name}'; {hint}")
    if not isinstance(optimizer, optim.Optimizer):
        raise TypeError(f"optimizer is {type(optimizer).__name__}; give an optimizer of torch.optim")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; give the nn.Module that the optimizer trains")
    for hook in optimizer._optimizer_step_pre_hooks.values():
        if isinstance(getattr(hook, "__self__", None), Attachment):
            raise ValueError("optimizer has rules attached already; detach() them first, or attach all rules at once")
    rules = {
        place: _rules_for(place, given)
        for place, given in {"gradient": gradient, "update": update, "weight": weight}.items()
    }
    _check_order(rules, optimizer)
    parallel, model = parallel_wrapper(model), unwrapped(model)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for path, p in model.named_parameters():
        if is_lazy(p):
            raise ValueError(f"'{path}' has no shape yet; run the model once before rules are attached")
    params = {path: p for path, p in model.named_parameters() if id(p) in trained}
    others = {id(p): path for path, p in model.named_parameters() if id(p) not in trained}
    if not params:
        raise ValueError("optimizer trains none of the model's parameters; make it with model.parameters()")
    copies = {path: p.detach().clone() for path, p in params.items()}
    state = init(copies, key, *[rule for group in rules.values() for rule in group], where=where)
    if any(rule.redraws for rule in rules["weight"]) and torch_memory.counts_age(optimizer):
        state = state.with_slot(torch_memory.SLOT, born=torch_memory.unborn({p: copies[p] for p in state.plasticity}))
    for process_group in [parallel.process_group] if parallel is not None else groups(params):
        _check_ranks(state.key, process_group)
    return Attachment(optimizer, params, rules, state, others)


def _rules_for(place: str, given: Any) -> tuple[Rule, ...]:
    if not isinstance(given, Sequence):
        raise TypeError(f"{place} is {given!r}; give a list of rules, {place}=[…]")
    rules: list[Rule] = []
    for one in given:
        rules.extend(one.rules if isinstance(one, Chain) else [as_rule(one)])
    for rule in rules:
        if rule.phase not in _PHASES[place]:
            remedy = f"give it in {_PLACES[rule.phase]}=[…]" if rule.phase in _PLACES else "torch.optim does its work"
            raise ValueError(f"{place} has {rule.name}, a rule of phase {rule.phase}; {remedy}")
    return tuple(rules)


def _check_order(rules: dict[str, tuple[Rule, ...]], optimizer: optim.Optimizer) -> None:
    flat = [rule for group in rules.values() for rule in group]
    if not flat:
        raise TypeError("no rules; give some in gradient=[…], update=[…] or weight=[…]")
    name, scale_free = type(optimizer).__name__, isinstance(optimizer, torch_memory.SCALE_FREE)
    for rule in rules["gradient"]:
        if rule.applies_rates and scale_free:
            raise ValueError(
                f"gradient has {rule.name}, but {name} divides constant factors of its gradient out again; give it in "
                "update=[…]"
            )
    writer = next((rule for rule in flat if rule.writes_rates), None)
    if writer and not any(rule.applies_rates for rule in flat):
        raise ValueError(
            f"{writer.name} writes learning-rate factors that no rule applies; give "
            "update=[functools.partial(bf.fuzzy_learning_rates, nu=0)], which applies them and draws none"
        )
    step = named(f"torch.optim.{name}", adam() if scale_free else sgd())
    if isinstance(optimizer, optim.NAdam) and any(rule.redraws for rule in rules["weight"]):
        raise ValueError("NAdam would move a re-drawn synapse by 8 learning rates at once; use Adam or AdamW")
    chain(*rules["gradient"], step, *rules["update"], descend(1.0), *rules["weight"])


def _check_ranks(key: Tensor, group: "dist.ProcessGroup") -> None:
    keys = [torch.empty_like(key) for _ in range(dist.get_world_size(group))]
    dist.all_gather(keys, key, group=group)
    for rank, other in enumerate(keys):
        if not torch.equal(other, key):
            raise ValueError(f"rank {rank} has another key, so its parameters would drift away; give all the same")
