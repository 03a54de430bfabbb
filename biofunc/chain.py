"""Composition: one rule after another, as one pure function with one state."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from biofunc import philox, trees
from biofunc.keys import check_key
from biofunc.rule import Rule, as_rule, compute_dtype
from biofunc.running import on_trees
from biofunc.selection import Selection, is_synapse, select_paths, warn_of_stack
from biofunc.state import BioState
from biofunc.trees import Leaves, Tree, zero_of

__all__ = ["Chain", "chain", "init"]


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Chain:
    """Rules that run in order; made by `chain`.

    Attributes:
        rules: the rules, flattened, each under a name of its own.
    """

    rules: tuple[Rule, ...]

    def init(self, params: Tree, key: Tensor, *, where: Selection = None, **misplaced: Any) -> BioState:
        """Makes the state with which learning starts.

        Args:
            params: tree of floating-point parameters; those of an ensemble under `torch.vmap(learn.init)`.
            key: from `biofunc.random.key`; under vmap one per member.
            where: which leaves are synapses: a glob on paths, a predicate `(path, leaf) -> bool`, a tree of bools, or
                `layers(model, *types)`; default: leaves of two or more dimensions. What is given selects alone, so
                that a glob that matches biases makes synapses of them.
            misplaced: never given; it is here so that a hyperparameter given to init is told where it belongs.

        Returns:
            BioState with all the structure it will ever have. Parameters that look like the stack of an ensemble are
            warned of: the biases of several members would pass for synapses.

        Raises:
            TypeError, ValueError, KeyError: a leaf is not floating point, or `where` selects nothing.
        """
        return init(params, key, *self.rules, where=where, **misplaced)

    def __call__(self, params: Tree, grads: Tree, state: BioState, **signals: Any) -> tuple[Tree, Tree, BioState]:
        """One step of learning.

        Args:
            params: tree of parameters.
            grads: tree of gradients, like params.
            state: from `init`.
            signals: keywords of rules, by name: activity, a loss, or a hyperparameter of this step. Each rule gets
                those that its signature declares, so that `rate=0.5` reaches all rules with a `rate`;
                `**{"synaptic_scaling.rate": 0.5}` is for the rule of that name alone, and wins.

        Returns:
            New params, the descent direction as the last rule left it, and the new state.

        Raises:
            TypeError: no rule takes a signal.
            KeyError, ValueError, TypeError: trees that do not match; nothing is changed then.
        """
        params, grads, state = on_trees(list(self.rules), params, grads, state, signals)
        return params, grads, state.replace(step=state.step + 1)

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


def init(params: Tree, key: Tensor, *rules: Any, where: Selection = None, **misplaced: Any) -> BioState:
    """Makes the state for rules that are called one by one.

    Args:
        params: tree of floating-point parameters.
        key: from `biofunc.random.key`; it moves to the device of the parameters.
        rules: the rules that will be called with the state; keywords bound with `functools.partial` reach their init.
        where: which leaves are synapses, see `Chain.init`.
        misplaced: never given, see `Chain.init`.

    Returns:
        BioState with all the structure it will ever have.

    Raises:
        TypeError, ValueError, KeyError: a leaf is not floating point, a key is none, or `where` selects nothing.
    """
    for name in misplaced:
        takers = [rule.name for rule in map(as_rule, rules) if name in rule.accepts] or ["rule"]
        raise TypeError(
            f"init takes no keyword '{name}'; bind a hyperparameter to its rule, functools.partial({takers[0]}, "
            f"{name}=…), in bf.chain(…) or in bf.init(params, key, …)"
        )
    check_key(key)
    if key.dim() != 1:
        raise ValueError(
            f"key has shape {tuple(key.shape)}, so it holds several; an ensemble's states are made by "
            "torch.vmap(learn.init)(params, keys)"
        )
    made = [as_rule(given) for given in rules]
    _check_names(made)
    trees.check_given(params)
    flat, _ = trees.flatten(params)
    trees.check_params(flat)
    if where is None:
        warn_of_stack("params", flat, "make the states of an ensemble by torch.vmap(learn.init)(params, keys)")
    if flat:
        key = key.to(next(iter(flat.values())).device)
        philox.normal_table(key.device)  # is then there for steps that are compiled
    synapses = [p for p, leaf in flat.items() if is_synapse(p, leaf)] if where is None else select_paths(where, flat)
    _check_coverage(made, flat, synapses)
    zero = _zero(key, flat, made)
    state = BioState(
        key=key + zero,
        step=zero,
        plasticity={path: (zero + 1).to(flat[path].device, compute_dtype(flat[path])) for path in synapses},
        layout=tuple([(path, tuple(leaf.shape)) for path, leaf in flat.items()]),
    )
    redraws = any(rule.redraws for rule in made)
    for rule in made:
        if rule.initialise is not None:
            state = rule.initialise(rule, flat, state, redraws)
    return state


def _zero(key: Tensor, params: Leaves, rules: list[Rule]) -> Tensor:
    """An int64 0 made of all that init is given.

    State that was not batched from init on would become so in the first step, and a compiled step compiled twice.
    """
    bound = [value for rule in rules for value in rule.bound.values() if isinstance(value, Tensor)]
    return key[0] * 0 + zero_of([*params.values(), *bound], key.device)


def _check_names(rules: list[Rule]) -> None:
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two rules are named '{name}'; name one of them with bf.named('another name', rule)")


_STAGES = {"gradient": 0, "direction": 0, "optimizer": 0, "descend": 1, "weights": 2}
_ONCE: dict[str, Callable[[Rule], bool]] = {
    "optimizer": lambda rule: rule.phase == "optimizer",
    "rule that moves parameters": lambda rule: rule.phase == "descend",
    "rule that applies learning-rate factors": lambda rule: rule.applies_rates,
}
"""What may happen to a leaf once; several such rules must be restricted to different leaves."""


def _check_order(rules: list[Rule]) -> None:
    for index, rule in enumerate(rules):
        if rule.once and any(other.phase == "descend" for other in rules):
            raise ValueError(f"{rule.name} acts once, before learning; call it alone, not at each step of a chain")
        for earlier in rules[:index]:
            if _STAGES[rule.phase] < _STAGES[earlier.phase]:
                move = f"{earlier.name} behind descend" if earlier.phase == "weights" else f"{rule.name} before descend"
                what = "parameters" if rule.phase == "descend" else "gradient"
                raise ValueError(f"{rule.name} acts on the {what} and stands after {earlier.name}; move {move}")
            if rule.phase == "gradient" and earlier.phase == "optimizer":
                raise ValueError(
                    f"{rule.name} reads the raw gradient and stands after {earlier.name}; move it before {earlier.name}"
                )
            if rule.scale_free and earlier.applies_rates and not (rule.within or earlier.within):
                raise ValueError(
                    f"{earlier.name} stands before {rule.name}, which divides constant factors of its gradient out "
                    f"again; move {earlier.name} behind {rule.name}"
                )
            for what, does in _ONCE.items():
                if does(rule) and does(earlier) and not (rule.within and earlier.within):
                    raise ValueError(
                        f"more than one {what}: {earlier.name} and {rule.name}; keep one, or restrict them to "
                        "different leaves with bf.where"
                    )


def _check_coverage(rules: list[Rule], params: Leaves, synapses: Collection[str]) -> None:
    """Each rule has something to act on, no leaf is treated twice, and rates that are written are applied."""
    acted_on = {rule.name: rule.acts_on(params, dict.fromkeys(synapses)) for rule in rules}
    for rule in rules:
        if rule.within and not acted_on[rule.name]:
            chosen = ", ".join(select_paths(rule.within[-1], params))
            raise ValueError(f"{rule.name}: where selects no synapse, only {chosen}")
    for what, does in _ONCE.items():
        seen: dict[str, str] = {}
        for rule in [rule for rule in rules if does(rule)]:
            for path in acted_on[rule.name]:
                if path in seen:
                    raise ValueError(f"more than one {what} on '{path}': {seen[path]} and {rule.name}")
                seen[path] = rule.name
        if seen and what == "rule that applies learning-rate factors":
            for rule in [rule for rule in rules if rule.writes_rates]:
                for path in acted_on[rule.name]:
                    if path not in seen:
                        raise ValueError(f"{rule.name} writes rates of '{path}' that no rule applies there")
