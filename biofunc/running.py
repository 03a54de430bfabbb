"""Runs rules one after another: checks signals and trees, then hands each rule flat dicts, its signals and its keys."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from biofunc import trees
from biofunc.noise import StepKeys
from biofunc.sharding import aligned, is_sharded
from biofunc.state import BioState
from biofunc.trees import Leaves, Tree

if TYPE_CHECKING:
    from biofunc.rule import Rule

Flat: TypeAlias = tuple[Leaves, Leaves, BioState]
"""Params, grads and state, as a rule takes and gives them."""


def check_signals(rules: "Sequence[Rule]", signals: Mapping[str, Any], kind: str) -> None:
    """Refuses a signal that no rule takes at a step.

    Args:
        rules: at least one.
        signals: what is handed over, by name or by "rule.keyword".
        kind: what the rules are, for the message; "" for a single one, which then says what it takes.

    Raises:
        TypeError: no rule takes it.
    """
    for name in signals:
        address, dot, keyword = name.rpartition(".")
        takers = [rule for rule in rules if (rule.name == address if dot else keyword in rule.accepts)]
        if kind and dot and not takers:
            names = ", ".join([rule.name for rule in rules])
            raise TypeError(f"no {kind} is named '{address}', as '{name}' says; their names are: {names}")
        if kind and not takers:
            accepted = sorted({keyword for rule in rules for keyword in rule.accepts if keyword not in rule.at_init})
            raise TypeError(f"no {kind} takes '{name}'; they take: {', '.join(accepted) or 'nothing'}")
        for rule in takers:
            rule.check_keyword(keyword, at_step=True)
        if not takers:
            rules[0].check_keyword(name, at_step=True)


def given_to(rule: "Rule", signals: Mapping[str, Any]) -> dict[str, Any]:
    """The signals that are for a rule.

    Args:
        rule: one of those that run.
        signals: what is handed over, by name or by "rule.keyword", which wins.

    Returns:
        Values by keyword.
    """
    keywords = {name: value for name, value in signals.items() if name in rule.accepts}
    addressed = {name: name.rpartition(".") for name in signals if "." in name}
    return keywords | {keyword: signals[name] for name, (to, _, keyword) in addressed.items() if to == rule.name}


def on_trees(
    rules: "list[Rule]", params: Tree, grads: Tree, state: BioState, signals: Mapping[str, Any]
) -> tuple[Tree, Tree, BioState]:
    """Runs rules on whole trees: checks all of the input, then each rule on flat dicts, then back to trees.

    Args:
        rules: in their order.
        params: tree of parameters.
        grads: tree of descent directions, like params.
        state: made with these rules.
        signals: hyperparameters and signals, by name or by "rule.keyword".

    Returns:
        New params, grads and state; the state's step and key stay.

    Raises:
        TypeError, ValueError, KeyError: as the message says; nothing is changed then.
    """
    check_signals(rules, signals, "" if len(rules) == 1 else "rule of the chain")
    for rule in rules:
        rule.check_needs(given_to(rule, signals))
    flat_params, params_structure = trees.flatten(params)
    flat_grads, grads_structure = trees.flatten(grads)
    if flat_grads.keys() != flat_params.keys():
        trees.check_none("grads", grads, flat_params)
    _check_inputs(flat_params, flat_grads, state)
    directions = {path: aligned("grads", path, flat_grads[path], leaf) for path, leaf in flat_params.items()}
    flat_params, directions, state = on_leaves(rules, flat_params, directions, state, signals)
    # Back in the order of their own tree: optree sorts the keys of a dict, not those of an OrderedDict
    flat_grads = {path: directions[path] for path in flat_grads}
    return trees.unflatten(params_structure, flat_params), trees.unflatten(grads_structure, flat_grads), state


def on_leaves(
    rules: "Sequence[Rule]", params: Leaves, grads: Leaves, state: BioState, signals: Mapping[str, Any]
) -> Flat:
    """Runs rules one after another on flat dicts; each gets the signals that its signature declares.

    Args:
        rules: in their order.
        params: parameters by path.
        grads: descent directions by path.
        state: made with these rules.
        signals: hyperparameters and signals, checked.

    Returns:
        New params, grads and state.
    """
    drawing = [rule for rule in rules if rule.draws]
    keyed = params if any(rule.every_leaf for rule in drawing) else state.plasticity
    noise = StepKeys(state, [rule.name for rule in drawing], list(keyed))
    for rule in rules:
        keywords = given_to(rule, signals)
        if rule.draws:
            keywords["noise"] = noise
        params, grads, state = rule.transform(rule, params, grads, state, keywords)
    return params, grads, state


def on_present(
    rules: "Sequence[Rule]", params: Leaves, grads: Leaves, state: BioState, signals: Mapping[str, Any]
) -> Flat:
    """Runs rules on the parameters that have a gradient; what the state keeps about all others stays as it was.

    Args:
        rules: in their order.
        params: parameters by path.
        grads: descent directions by path, of some of them.
        state: made with these rules.
        signals: hyperparameters and signals, checked.

    Returns:
        New params and grads of those that have a gradient, and the new state.
    """
    active = [path for path in params if path in grads]
    synapses = {path: rate for path, rate in state.plasticity.items() if path in grads}
    nothing = {path: p.new_zeros(()).expand(p.shape) for path, p in params.items() if path not in grads}
    new_params, new_grads, new = on_leaves(
        rules, params, {**grads, **nothing}, state.replace(plasticity=synapses), signals
    )
    new = _keep(new, state, set(nothing)) if nothing else new
    return {path: new_params[path] for path in active}, {path: new_grads[path] for path in active}, new


def _keep(new: BioState, old: BioState, paths: set[str]) -> BioState:
    """The new state, in which all that is kept about some paths is as in the old one."""

    def kept(fresh: Leaves, stale: Leaves) -> Leaves:
        return {path: stale[path] if path in paths else fresh[path] for path in stale}

    slots = {
        name: {entry: kept(leaves, old.slots[name][entry]) for entry, leaves in slot.items()}
        for name, slot in new.slots.items()
    }
    return new.replace(
        plasticity=kept(new.plasticity, old.plasticity),
        polarity=kept(new.polarity, old.polarity),
        activity=kept(new.activity, old.activity),
        slots=slots,
    )


def _check_inputs(params: dict[str, Any], grads: dict[str, Any], state: BioState) -> None:
    if not isinstance(state, BioState):
        raise TypeError(f"state is {type(state).__name__}; make a BioState with bf.init or chain.init")
    trees.check_params(params)
    trees.check_like("grads", grads, params)
    made_for = dict(state.layout)
    for path in made_for:
        if path not in params:
            raise KeyError(f"state was made with a leaf '{path}' that params lacks; was it made for another model?")
    for path, leaf in params.items():
        if path not in made_for:
            raise KeyError(f"state was made without the leaf '{path}' of params; was it made for another model?")
        if tuple(leaf.shape) != made_for[path]:
            raise ValueError(
                f"params leaf '{path}' has shape {tuple(leaf.shape)}, the state was made for {made_for[path]}; "
                "was it made for another model? An ensemble runs in torch.vmap"
            )
    _check_sharding(params, state)
    if state.key.dim() != 1:
        raise ValueError(f"state.key has shape {tuple(state.key.shape)}; the states of an ensemble run in torch.vmap")


def _check_sharding(params: Leaves, state: BioState) -> None:
    kept = {name: getattr(state, name) for name in ("plasticity", "polarity", "activity")}
    kept |= {f"slots of {name}": leaves for name, slot in state.slots.items() for leaves in slot.values()}
    for place, leaves in kept.items():
        for path, leaf in leaves.items():
            if leaf.dim() and path in params and is_sharded(leaf) != is_sharded(params[path]):
                kinds = ("DTensors", "plain tensors") if is_sharded(leaf) else ("plain tensors", "DTensors")
                raise TypeError(
                    f"state has {kinds[0]} and params {kinds[1]}: '{path}' in {place}; make the state with init of the "
                    "parameters as they are"
                )
