"""Dale's principle: a neuron excites or inhibits, at all its synapses alike.

A neuron releases the same transmitter at all its terminals, so that all its outgoing weights have one sign; some 80 %
of cortical neurons are excitatory. With polarity s = ±1 per presynaptic neuron (a column of a Linear weight, an input
channel of a Conv weight):

    once:               w <- |w| s
    after each step:    w <- w where w s >= 0, else 0

The signs are drawn or those of the majority of a neuron's outgoing weights, and stay. They are settled leaf by leaf: a
neuron that feeds several leaves has a sign in each. Imposed on a standard network the principle impairs learning
(Cornford, Kalajdzievski, Leite, Lamarquette, Kullmann, Richards 2021, openreview.net/forum?id=eU776ZYxEpz): it is a
constraint, not an aid.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from biofunc.decorator import rule
from biofunc.noise import Noise
from biofunc.sharding import replicated, settled
from biofunc.state import BioState
from biofunc.trees import Leaves
from biofunc.wrappers import unwrapped

__all__ = ["enforce_dales_principle", "impose_dales_principle", "presynaptic_axes"]

Axis = str | Mapping[str, tuple[int, int]]
"""Where the presynaptic neurons of a weight are: "presynaptic", "postsynaptic", or `(axis, groups)` by path."""


def presynaptic_axes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Says which axis of each layer's weight counts the presynaptic neurons.

    Args:
        model: the module whose `named_parameters` the parameter dict comes from.

    Returns:
        `(axis, groups)` by path, for `axis=`: (1, 1) for Linear, (1, groups) for Conv, (0, 1) for ConvTranspose,
        Embedding and EmbeddingBag. A tied weight has the axis of the layer under whose name it is a parameter.

    Raises:
        TypeError: model is not a module.
        ValueError: the model has no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; presynaptic_axes takes an nn.Module")
    axes: dict[int, tuple[int, int]] = {}
    for layer in model.modules():
        weight = id(layer._parameters.get("weight"))
        if isinstance(layer, _ConvTransposeNd | nn.Embedding | nn.EmbeddingBag):
            axes.setdefault(weight, (0, 1))
        elif isinstance(layer, nn.Linear | _ConvNd):
            axes.setdefault(weight, (1, layer.groups if isinstance(layer, _ConvNd) else 1))
    # The names in a wrapper's own parameters and those without its prefix
    named = [*model.named_parameters(), *unwrapped(model).named_parameters()]
    paths = {path: axes[id(parameter)] for path, parameter in named if id(parameter) in axes}
    if not paths:
        raise ValueError("the model has no Linear, Conv, ConvTranspose or Embedding layer whose weight is a parameter")
    return paths


def _settle_polarity(
    params: Leaves,
    state: BioState,
    *,
    axis: Axis = "presynaptic",
    fraction_excitatory: float | Tensor = 0.8,
    sign: str = "majority",
    noise: Noise,
    name: str,
) -> BioState:
    check_axis(name, axis, [path for path, _ in state.layout])
    places = {path: presynaptic_place(name, path, w, axis) for path, w in params.items()}
    # state.step is 0 and batched if anything is: so is the polarity, whatever it is made of
    votes = {path: outgoing_sum(w, *places[path]) + state.step.to(w) for path, w in params.items()}
    if sign == "drawn":
        votes = {path: torch.zeros_like(vote) for path, vote in votes.items()}
    polarity = dict(state.polarity)
    (chance,) = noise.draw(votes, "uniform")
    for path, vote in votes.items():
        excitatory = torch.where(vote == 0, chance[path] < fraction_excitatory, vote > 0)
        signs = _per_synapse(2 * excitatory.to(params[path].dtype) - 1, params[path])
        known = polarity.setdefault(path, signs)
        if known.shape != signs.shape:
            raise ValueError(
                f"{name}: axis asks for a polarity of '{path}' of shape {tuple(signs.shape)}, and another rule has set "
                f"one of shape {tuple(known.shape)}; give both the same axis"
            )
    return state.replace(polarity=polarity)


def check_axis(name: str, axis: Any, paths: Sequence[str]) -> None:
    """Refuses what is no `axis`, or a dict that names no leaf at all.

    Args:
        name: of the rule, for the message.
        axis: what the rule was given.
        paths: of the leaves that the rule acts on.

    Raises:
        ValueError: `axis` is none.
        KeyError: it names no leaf.
    """
    if not isinstance(axis, Mapping) and axis not in ("presynaptic", "postsynaptic"):
        raise ValueError(
            f"{name}: axis is {axis!r}; it must be 'presynaptic', 'postsynaptic', or a dict path -> (axis, groups), "
            "bf.presynaptic_axes(model)"
        )
    if isinstance(axis, Mapping) and axis and not any(path in axis for path in paths):
        raise KeyError(f"{name}: axis names '{next(iter(axis))}' and no leaf of params; they are: {', '.join(paths)}")


def presynaptic_place(name: str, path: str, w: Tensor, axis: Axis) -> tuple[int, int]:
    """Axis of a leaf's presynaptic neurons, and in how many groups of outputs they fall."""
    if isinstance(axis, str) or path not in axis:
        return (1 if axis != "postsynaptic" and w.dim() > 1 else 0), 1
    place: Any = axis[path]
    if not (isinstance(place, tuple) and [type(number) for number in place] == [int, int]):
        raise TypeError(f"{name}: axis of '{path}' is {place!r}; it must be a pair of integers (axis, groups)")
    dim, groups = place
    if not 0 <= dim < w.dim():
        raise ValueError(f"{name}: axis of '{path}' is {dim}; the leaf has {w.dim()} dimensions, counted from 0")
    if groups < 1 or (groups > 1 and (dim == 0 or w.shape[0] % groups)):
        raise ValueError(
            f"{name}: '{path}' of shape {tuple(w.shape)} has {groups} groups along axis {dim}; groups must be 1, or "
            "divide axis 0 and belong to another axis"
        )
    return dim, groups


def outgoing_sum(w: Tensor, axis: int, groups: int) -> Tensor:
    """Sum of the finite outgoing weights of each neuron, `(groups, *keepdim)`; below two dimensions, each its own.

    In float64, so that no sign hangs on the order of summation, which vmap changes.
    """
    finite = torch.where(torch.isfinite(w), w, 0.0).double()
    if groups == 1:
        grouped = finite.unsqueeze(0)
    else:  # groups may straddle the processes that share the leaf
        grouped = replicated(finite).reshape(groups, w.shape[0] // groups, *w.shape[1:])
    others = [dim for dim in range(1, grouped.dim()) if dim != axis + 1]
    return settled(grouped.sum(others, keepdim=True)) if others else grouped


def _per_synapse(signs: Tensor, w: Tensor) -> Tensor:
    """Signs `(groups, *keepdim)` in a shape that broadcasts with the weight."""
    if signs.shape[0] == 1:
        return signs.squeeze(0)
    return signs.expand(-1, w.shape[0] // signs.shape[0], *signs.shape[2:]).flatten(0, 1).contiguous()


def _signs(path: str, state: BioState) -> Tensor:
    """The polarity of a leaf, as it broadcasts with the weight."""
    if path not in state.polarity:
        raise KeyError(f"state has no polarity of '{path}'; make it with the rule restricted as it is at the step")
    return state.polarity[path]


@rule(
    phase="weights",
    ranges={"fraction_excitatory": "[0, 1]"},
    choices={"sign": ("majority", "drawn")},
    init=_settle_polarity,
)
def enforce_dales_principle(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    axis: Axis = "presynaptic",
    fraction_excitatory: float | Tensor = 0.8,
    sign: str = "majority",
) -> tuple[Leaves, Leaves, BioState]:
    """Silences synapses that would change the sign of their neuron: `w <- w where w s >= 0, else 0`.

    All hyperparameters act at init, which sets the signs `s = state.polarity`, of a shape that broadcasts with the
    weight; signs that another rule has set before are kept.

    Args:
        params: tree of parameters.
        grads: tree like params.
        state: made with this rule; its `polarity` is applied. The rule is idempotent.
        axis: "presynaptic": one sign per index of axis 1, as in Linear and Conv; "postsynaptic": one per index of axis
            0, the row-wise sign of the original, which is not Dale's principle; or a dict path -> (axis, groups), as
            `presynaptic_axes(model)` gives, which also knows grouped Conv, ConvTranspose and Embedding (paths that are
            not in it: axis 1). In a leaf of fewer than two dimensions each synapse has a sign of its own.
        fraction_excitatory: probability that a drawn sign is +1, in [0, 1].
        sign: "majority": the sign of the sum of a neuron's outgoing weights, drawn where that is 0; random weights give
            some 50 % of excitatory neurons; "drawn": every sign is drawn; half of all random weights then are silenced
            at the first call, unless `impose_dales_principle` stands before.

    Returns:
        New params (0 is +0, and NaN passes), grads and state as given.

    Raises:
        ValueError, TypeError, KeyError: at init, a hyperparameter out of its range, an axis that a leaf does not have,
            or a polarity of another shape that is there already; at a step, any of the hyperparameters.
        KeyError: the state was made without this rule.

    Phase: weights.

    Noise: at init, one uniform per presynaptic neuron.

    Source: Eccles 1976, From electrical to chemical transmission in the central nervous system; the projection:
    pytorch_bio_transformations 0.0.5, `enforce_dales_principle`. It is no part of the paper of 2025.

    Differs: one sign per presynaptic neuron (the original: per row, and per kernel in Conv); signs of the majority,
    or +1 with probability 0.8 (the original: 0.5); no -0; the last layer is projected too.
    """

    def projected(w: Tensor, sign: Tensor) -> Tensor:
        lowest = torch.where(sign > 0, 0.0, -torch.inf).to(w.dtype)
        highest = torch.where(sign < 0, 0.0, torch.inf).to(w.dtype)
        return w.clamp(min=lowest).clamp(max=highest).add_(0.0)  # + 0: of a -0, clamp makes either zero

    return {path: projected(w, _signs(path, state)) for path, w in params.items()}, grads, state


@rule(
    phase="weights",
    ranges={"fraction_excitatory": "[0, 1]"},
    choices={"sign": ("majority", "drawn")},
    init=_settle_polarity,
    once=True,
)
def impose_dales_principle(
    params: Leaves,
    grads: Leaves,
    state: BioState,
    *,
    axis: Axis = "presynaptic",
    fraction_excitatory: float | Tensor = 0.8,
    sign: str = "majority",
) -> tuple[Leaves, Leaves, BioState]:
    """Gives every synapse the sign of its neuron and keeps its strength: `w <- |w| s`, with `s = state.polarity`.

    Used once, before learning, with a state that `enforce_dales_principle` shares (there are no gradients yet: params
    stand in): `state = bf.init(params, key, bf.impose_dales_principle, *learn.rules)`, then
    `params, _, state = bf.impose_dales_principle(params, params, state)`.

    Args:
        params: tree of parameters.
        grads: tree like params.
        state: made with this rule; its `polarity` is applied. The rule is idempotent.
        axis: as for `enforce_dales_principle`.
        fraction_excitatory: as for `enforce_dales_principle`, in [0, 1].
        sign: as for `enforce_dales_principle`; "drawn" makes a network of which 80 % of neurons are excitatory.

    Returns:
        New params (zeros and NaN pass), grads and state as given.

    Raises:
        ValueError, TypeError, KeyError: as for `enforce_dales_principle`.

    Phase: weights; called alone: a chain that moves parameters refuses it.

    Noise: at init, one uniform per presynaptic neuron.

    Source: as for `enforce_dales_principle`; in the original, `dalian_network_initialization`.

    Differs: as for `enforce_dales_principle`; a trained network keeps the signs of the majority.
    """

    def turned(w: Tensor, sign: Tensor) -> Tensor:
        return torch.where(w * sign < 0, -w, w)

    weights = {path: turned(w, _signs(path, state)) for path, w in params.items()}
    return weights, grads, state
