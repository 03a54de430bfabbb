"""Composition: one rule after another, as one pure function with one state."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from biofunc import random, trees
from biofunc.noise import step_noise
from biofunc.rule import Rule, as_rule, compute_dtype, flatten_inputs
from biofunc.selection import Selection, is_synapse, select_paths
from biofunc.state import BioState
from biofunc.trees import Tree

__all__ = ["Chain", "chain", "init"]


@dataclasses.dataclass(frozen=True, repr=False)
class Chain:
    """Rules that run in order; made by `chain`.

    Attributes:
        rules: the rules, flattened, each under a name of its own.
    """

    rules: tuple[Rule, ...]

    def init(self, params: Tree, key: Tensor, *, where: Selection = None) -> BioState:
        """Makes the state with which learning starts.

        Args:
            params: tree of floating-point parameters.
            key: from `biofunc.random.key`.
            where: which leaves are synapses: a glob on paths, a predicate `(path, leaf) -> bool`, a tree of bools, or
                `layers(model, *types)`; default: leaves of two or more dimensions.

        Returns:
            BioState with all the structure it will ever have.

        Raises:
            TypeError, ValueError, KeyError: a leaf is not floating point, or `where` selects nothing.
        """
        return init(params, key, *self.rules, where=where)

    def __call__(self, params: Tree, grads: Tree, state: BioState, **signals: Any) -> tuple[Tree, Tree, BioState]:
        """One step of learning.

        Args:
            params: tree of parameters.
            grads: tree of gradients, like params.
            state: from `init`.
            signals: keywords of rules, by name: activity, a loss, or a hyperparameter of this step. Each rule gets
                those that its signature declares.

        Returns:
            New params, the descent direction as the last rule left it, and the new state.

        Raises:
            TypeError: no rule takes a signal.
            KeyError, ValueError, TypeError: trees that do not match; nothing is changed then.
        """
        for name in signals:
            takers = [rule for rule in self.rules if name in rule.accepts]
            if not takers:
                accepted = sorted({keyword for rule in self.rules for keyword in rule.accepts})
                raise TypeError(f"no rule of the chain takes '{name}'; they take: {', '.join(accepted) or 'nothing'}")
            for rule in takers:
                rule.check_keyword(name, at_step=True)
        flat_params, flat_grads, structures = flatten_inputs(params, grads, state)
        noise = step_noise(state, [rule.name for rule in self.rules if rule.draws], list(flat_params))
        for rule in self.rules:
            keywords = {name: value for name, value in signals.items() if name in rule.accepts}
            if rule.draws:
                keywords["noise"] = noise[rule.name]
            flat_params, flat_grads, state = rule.transform(rule, flat_params, flat_grads, state, keywords)
        state = state.replace(step=state.step + 1)
        return trees.unflatten(structures[0], flat_params), trees.unflatten(structures[1], flat_grads), state

    def __repr__(self) -> str:
        return "\n".join(["chain(", *[f"    {rule!r}," for rule in self.rules], ")"])


def chain(*rules: Any) -> Chain:
    """Composes rules into one: `learn = chain(...)`, `state = learn.init(params, key)`, `learn(params, grads, state)`.

    Args:
        rules: rules, `functools.partial`s of rules, or chains, in the order in which they run: those that read the
            gradient, an optimizer, those that shape the update, `descend`, those that act on weights.

    Returns:
        The chain. It keeps the state's key and advances its step by one per call.

    Raises:
        TypeError: an argument is not a rule.
        ValueError: an order that cannot be right, two rules of one name, or rates that no rule applies.
    """
    flat: list[Rule] = []
    for given in rules:
        flat.extend(given.rules if isinstance(given, Chain) else [as_rule(given)])
    _check_names(flat)
    _check_order(flat)
    writer = next((rule for rule in flat if rule.writes_rates), None)
    if writer and not any(rule.applies_rates for rule in flat):
        raise ValueError(
            f"{writer.name} writes learning-rate factors that no rule applies; add "
            "functools.partial(bf.fuzzy_learning_rates, nu=0) before descend: it applies them and draws none"
        )
    return Chain(tuple(flat))


def init(params: Tree, key: Tensor, *rules: Any, where: Selection = None) -> BioState:
    """Makes the state for rules that are called one by one.

    Args:
        params: tree of floating-point parameters.
        key: from `biofunc.random.key`.
        rules: the rules that will be called with the state; keywords bound with `functools.partial` reach their init.
        where: which leaves are synapses, see `Chain.init`.

    Returns:
        BioState with all the structure it will ever have.

    Raises:
        TypeError, ValueError, KeyError: a leaf is not floating point, a key is none, or `where` selects nothing.
    """
    random.check_key(key)
    made = [as_rule(given) for given in rules]
    _check_names(made)
    flat, _ = trees.flatten(params)
    trees.check_params(flat)
    synapses = [p for p, leaf in flat.items() if is_synapse(p, leaf)] if where is None else select_paths(where, flat)
    key = key.to(next(iter(flat.values())).device) if flat else key
    # Constants come from the inputs: inside vmap they are then batched and contiguous like all that follows them.
    zero = key[0] * 0
    if flat:
        zero = zero + next(iter(flat.values())).detach().reshape(-1)[:0].sum().to(zero)
    one = (zero + 1).to(torch.float32)
    state = BioState(
        key=key + zero.unsqueeze(-1),
        step=zero,
        plasticity={path: one.to(flat[path].device, compute_dtype(flat[path])) for path in synapses},
    )
    redraws = any(rule.redraws for rule in made)
    for rule in made:
        if rule.initialise is not None:
            state = rule.initialise(rule, flat, state, redraws)
    return state


def _check_names(rules: list[Rule]) -> None:
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rules are named '{name}'; name one of them with bf.named('another name', rule)")


def _check_order(rules: list[Rule]) -> None:
    stage = {"gradient": 0, "direction": 0, "optimizer": 0, "descend": 1, "weights": 2}
    latest: Rule | None = None
    optimizer: Rule | None = None
    for rule in rules:
        if latest and stage[rule.phase] < stage[latest.phase]:
            raise ValueError(
                f"{rule.name} acts on the {'gradient' if rule.phase != 'descend' else 'parameters'} and stands after "
                f"{latest.name}; move {_remedy(rule, latest)}"
            )
        if rule.phase == "descend" and latest and latest.phase == "descend":
            raise ValueError(f"two rules move the parameters, {latest.name} and {rule.name}; keep one")
        if rule.phase == "optimizer" and optimizer:
            raise ValueError(f"two optimizers, {optimizer.name} and {rule.name}; keep one")
        if rule.phase == "gradient" and optimizer:
            raise ValueError(f"{rule.name} reads the raw gradient and stands after {optimizer.name}; move it before")
        optimizer = rule if rule.phase == "optimizer" else optimizer
        latest = rule


def _remedy(rule: Rule, latest: Rule) -> str:
    return f"{latest.name} behind descend" if latest.phase == "weights" else f"{rule.name} before {latest.name}"
