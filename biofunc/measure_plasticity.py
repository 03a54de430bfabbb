"""Measures of plasticity: the learning rates that synapses have, and what a network still learns."""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from biofunc.measured import check_not_negative, computed, joined, selected
from biofunc.selection import Selection
from biofunc.sharding import whole
from biofunc.state import BioState
from biofunc.trees import Leaves, Tree

__all__ = ["crystallised_fraction", "effective_number_of_rates", "rate_spectrum", "response_probe"]

State = TypeVar("State")

# 80 bins a factor of 1.1 wide, from 0.001 to 2.04; the rate 1 lies in the middle of one, where rounding cannot split it
RATE_EDGES = tuple([1.1 ** (k - 0.5) for k in range(-72, 9)])


def crystallised_fraction(
    state: BioState, *, below: float | Tensor = 0.1, where: Selection | BioState = None
) -> Tensor:
    """Share of the synapses whose learning rate has fallen below a share of the rate they were born with.

        fraction = mean of (rho < below * innate)

    Args:
        state: its `plasticity` is looked at.
        below: share of the innate rate, >= 0.
        where: which synapses count; default: all of the state.

    Returns:
        0-d tensor in [0, 1]; NaN for a state without synapses.

    Raises:
        ValueError: a negative `below`, the stacked state of an ensemble, or `where` selects nothing.
        TypeError, KeyError: `state` is no state, or `where` does not match it.
    """
    check_not_negative("below", below)
    rates = _rates(state, where)
    known = [torch.isfinite(rate) for rate in rates.values()]
    fallen = []
    for (path, rate), finite in zip(rates.items(), known, strict=True):
        innate = state.innate(path)
        fallen.append(finite & (rate < below * (torch.ones_like(rate) if innate is None else whole(innate.detach()))))
    return joined(fallen).sum() / joined(known).sum()


def rate_spectrum(
    state: BioState | Tensor,
    *,
    edges: Sequence[float] | Tensor | None = None,
    where: Selection | BioState = None,
) -> Tensor:
    """Spectrum of learning rates: the share of the synapses in each bin.

    Args:
        state: its `plasticity`, or a tensor of rates of any shape.
        edges: rising edges of the bins, two or more; the first bin takes what is smaller too, the last what is larger.
            Default: 80 bins, each a factor of 1.1 wide, from 0.001 to 2.04.
        where: which synapses of the state count; default: all.

    Returns:
        `(bins,)`, shares that sum to 1; NaN without synapses.

    Raises:
        ValueError: edges that do not rise, the stacked state of an ensemble, or `where` selects nothing.
        TypeError, KeyError: `state` is no state, or `where` does not match it.
    """
    edges = _edges(RATE_EDGES if edges is None else edges)
    rates = [whole(state.detach())] if isinstance(state, Tensor) else list(_rates(state, where).values())
    values = joined(rates)
    known = (~values.isnan()).to(torch.int64)
    bins = torch.bucketize(values, edges[1:-1].to(values), right=True)
    counts = torch.zeros(len(edges) - 1, dtype=torch.int64, device=values.device).scatter_add(0, bins, known)
    shares: Tensor = counts / known.sum()
    return shares


def effective_number_of_rates(
    state: BioState | Tensor,
    *,
    edges: Sequence[float] | Tensor | None = None,
    where: Selection | BioState = None,
) -> Tensor:
    """How many different learning rates a network has: 1 if all are equal, n if n rates are equally common.

        N = exp(-sum p_i ln p_i),    p = rate_spectrum(state)

    Rates in one bin count as equal, so that numbers compare only for equal edges.

    Args:
        state: as for `rate_spectrum`.
        edges: as for `rate_spectrum`.
        where: as for `rate_spectrum`.

    Returns:
        0-d tensor in [1, bins]; NaN without synapses.

    Raises:
        ValueError, TypeError, KeyError: as for `rate_spectrum`.

    Source: the effective number of species, Hill 1973, doi 10.2307/1934352, of order 1.
    """
    number: Tensor = torch.special.entr(rate_spectrum(state, edges=edges, where=where)).sum().exp()
    return number


def response_probe(
    step: Callable[..., tuple[Tree, State]],
    params: Tree,
    state: State,
    batches: Iterable[Sequence[Any]],
    loss: Callable[[Tree], Tensor],
) -> Tensor:
    """Plasticity as a response: how far the loss falls on average over the next K updates on a new task.

        Y = (1/K) sum_{k=1..K} (L_0 - L_k),    L_k = loss after k updates

    Nothing is changed: the updates make new params and states, and the network goes on from where it was.

    Args:
        step: an update, `step(params, state, *batch) -> (params, state)`, vmapped for an ensemble.
        params: the parameters that are probed.
        state: for a fair comparison of networks a fresh one, `learn.init(params, key)`.
        batches: K tuples or lists, each what one update takes; one epoch of a DataLoader is K batches. The source has
            K = 100.
        loss: `loss(params)`, the loss on the new task over the same data at each call; 0-d, or `(members,)` if vmapped.

    Returns:
        Shaped like the loss; positive where learning helps, 0 for a network that cannot learn.

    Raises:
        TypeError: step is no function, a batch no tuple or list, or the loss no tensor.
        ValueError: there are no batches.

    Source: Hofmann, Mäder 2026, arXiv 2610.09621.
    """
    start, drops = _loss_of(loss, params), []
    for batch in batches:
        if not isinstance(batch, tuple | list):
            raise TypeError(f"batches holds a {type(batch).__name__}; each is a tuple, step(params, state, *batch)")
        if not callable(step):
            raise TypeError(f"step is {step!r}; it must be a function")
        params, state = step(params, state, *batch)
        drops.append(start - _loss_of(loss, params))
    if not drops:
        raise ValueError("batches is empty; a response takes at least one update (an iterator is used up only once)")
    return torch.stack(drops).mean(0)


def _loss_of(loss: Callable[[Tree], Tensor], params: Tree) -> Tensor:
    value = loss(params)
    if not isinstance(value, Tensor):
        raise TypeError(f"loss gives {type(value).__name__}; it must give a tensor")
    return value.detach()


def _edges(edges: Sequence[float] | Tensor) -> Tensor:
    if isinstance(edges, str) or not isinstance(edges, Sequence | Tensor):
        raise TypeError(f"edges are {edges!r}; give two or more numbers that rise")
    rising = isinstance(edges, Tensor) or all([low < high for low, high in pairwise(edges)])
    if len(edges) < 2 or not rising:
        raise ValueError(f"edges are {edges}; give two or more that rise")
    return edges if isinstance(edges, Tensor) else torch.tensor(edges, dtype=torch.float64)


def _rates(state: BioState, where: Selection | BioState) -> Leaves:
    """The learning-rate factor of each synapse by path, spread out where all synapses of a leaf share one."""
    if not isinstance(state, BioState):
        raise TypeError(f"state is {type(state).__name__}; give the BioState of the run")
    shapes = dict(state.layout)
    rates: Leaves = {}
    for path, rate in state.plasticity.items():
        shape = shapes.get(path, tuple(rate.shape))
        if rate.dim() and rate.shape != shape:
            raise ValueError(
                f"plasticity of '{path}' has shape {tuple(rate.shape)}, its weight {shape}; measure the stacked state "
                "of an ensemble under torch.vmap"
            )
        rates[path] = computed(rate).expand(shape)
    return rates if where is None else {path: rates[path] for path in selected(rates, where)}
