"""Measures of weights: how synapses turn over, what sizes and signs they have."""

from collections.abc import Mapping

import torch
from torch import Tensor

from biofunc import trees
from biofunc.dale import Axis, check_axis, outgoing_sum, presynaptic_place
from biofunc.measured import all_weights, check_floating, check_not_negative, computed, joined, selected
from biofunc.rule import compute_dtype
from biofunc.selection import Selection
from biofunc.sharding import whole
from biofunc.state import BioState
from biofunc.trees import Leaves, Tree

__all__ = ["dale_consistency", "log_weight_kurtosis", "log_weight_skew", "sign_balance", "survival", "turnover"]


def turnover(
    before: Tree,
    after: Tree,
    *,
    threshold: float | Tensor = 0.0,
    sign_flips: bool = True,
    where: Selection | BioState = None,
) -> Tensor:
    """Turnover ratio: the share of synapses that were gained or lost between two days.

        ratio = (gained + lost) / (present before + present after),    present = |w| > threshold

    As a spine in the microscope, a synapse that is replaced by one of the same sign between two looks is not noticed,
    so that the true turnover is higher.

    Args:
        before: tree of parameters at the first time.
        after: tree like it at the second.
        threshold: size above which a synapse can be seen, >= 0, in the unit of the weights.
        sign_flips: whether a change of sign counts as a loss and a gain: no excitatory synapse becomes inhibitory.
        where: which leaves count.

    Returns:
        0-d tensor in [0, 1]; NaN when no synapse is present at either time.

    Raises:
        ValueError: a negative threshold, shapes that differ, or `where` selects nothing.
        KeyError, TypeError: trees that differ, or leaves that are not floating point.

    Source: in-vivo imaging of spines, Holtmaat et al. 2005, doi 10.1016/j.neuron.2005.01.003; signs are our addition.
    """
    old, new = trees.flatten(before)[0], trees.flatten(after)[0]
    check_floating("before", old)
    trees.check_like("after", new, old)
    check_not_negative("threshold", threshold)
    paths = selected(old, where)
    first = joined([_presence(old[path], threshold, sign_flips) for path in paths])
    second = joined([_presence(new[path], threshold, sign_flips) for path in paths])
    changed = first != second
    lost, gained = (changed & (first != 0)).sum(), (changed & (second != 0)).sum()
    return (lost + gained) / ((first != 0).sum() + (second != 0).sum())


def survival(
    history: Tree,
    *,
    threshold: float | Tensor = 0.0,
    sign_flips: bool = True,
    where: Selection | BioState = None,
) -> Tensor:
    """Survival curve: the share of the synapses present at time 0 that have been present ever since.

        S_t = #{present at 0, 1, ..., t} / #{present at 0},    present = |w| > threshold

    A synapse that comes back is a new one, so that the curve never rises.

    Args:
        history: tree of parameters with a leading time axis, `bf.ensemble.stack(snapshots)`.
        threshold: as for `turnover`, >= 0.
        sign_flips: whether a synapse that changes its sign is lost.
        where: which leaves count.

    Returns:
        `(times,)` from 1 downwards, in [0, 1]; NaN when no synapse is present at time 0.

    Raises:
        ValueError: a negative threshold, leaves without a common time axis, or `where` selects nothing.
        TypeError, KeyError: leaves that are not floating point, or `where` does not match them.

    Source: survival fraction of spines, Holtmaat et al. 2005, doi 10.1016/j.neuron.2005.01.003.
    """
    flat, _ = trees.flatten(history)
    check_floating("history", flat)
    check_not_negative("threshold", threshold)
    times = next((leaf.shape[0] for leaf in flat.values() if leaf.dim()), 0)
    for path, leaf in flat.items():
        if leaf.dim() == 0 or leaf.shape[0] != times or times == 0:
            raise ValueError(
                f"history leaf '{path}' has shape {tuple(leaf.shape)}; all leaves share a first axis, time, of length "
                "1 or more: bf.ensemble.stack(snapshots)"
            )
    paths = selected({path: leaf[0] for path, leaf in flat.items()}, where)
    signs = torch.cat([_presence(flat[path], threshold, sign_flips).reshape(times, -1) for path in paths], 1)
    alive = ((signs == signs[:1]) & (signs[:1] != 0)).to(torch.int64).cumprod(0).sum(1)
    return alive / alive[0]


def sign_balance(params: Tree, *, where: Selection | BioState = None) -> Tensor:
    """Share of excitatory (positive) synapses among those that are not 0.

    Args:
        params: tree of parameters.
        where: which leaves count.

    Returns:
        0-d tensor in [0, 1]; NaN when all weights are 0. Cortex: about 0.8, a network at its start: 0.5.

    Raises:
        ValueError, TypeError, KeyError: a leaf is not floating point, or `where` selects nothing.
    """
    w = all_weights(params, where)
    return (w > 0).sum() / (w.abs() > 0).sum()


def dale_consistency(
    params: Tree,
    *,
    polarity: Mapping[str, Tensor] | None = None,
    axis: Axis = "presynaptic",
    where: Selection | BioState = None,
) -> Leaves:
    """How far each presynaptic neuron obeys Dale's principle: the share of its synapses that have its sign.

        c_j = max(n+_j, n-_j) / (n+_j + n-_j),    n = number of outgoing weights of neuron j above and below 0

    Args:
        params: tree of parameters.
        polarity: `state.polarity`, the sign of each neuron by path; default: that of the majority of its synapses.
        axis: where the presynaptic neurons of a weight are, as for `enforce_dales_principle`.
        where: which leaves count.

    Returns:
        By path, `(neurons,)`, group by group in grouped Conv: in [0.5, 1], with `polarity` in [0, 1]; NaN where all
        outgoing weights are 0. The mean over a network: `torch.cat(list(consistency.values())).nanmean()`.

    Raises:
        ValueError, TypeError: an axis that a leaf does not have, a leaf that is not floating point, or `where` selects
            nothing.
        KeyError: `polarity` lacks a leaf, or `axis` names none.
    """
    flat, _ = trees.flatten(params)
    check_floating("params", flat)
    check_axis("dale_consistency", axis, list(flat))
    consistency: Leaves = {}
    for path in selected(flat, where):
        w = whole(flat[path].detach())
        place = presynaptic_place("dale_consistency", path, w, axis)
        present = w.isfinite() & (w != 0)
        agrees = present & (w > 0)
        if polarity is not None:
            if path not in polarity:
                raise KeyError(f"polarity has no leaf '{path}', only: {', '.join(polarity) or '(none)'}")
            agrees = present & (w * whole(polarity[path].detach()) > 0)
        count = outgoing_sum(present.to(w.dtype), *place)
        share = (outgoing_sum(agrees.to(w.dtype), *place) / count).flatten()
        consistency[path] = (torch.maximum(share, 1 - share) if polarity is None else share).to(compute_dtype(w))
    return consistency


def log_weight_skew(params: Tree, *, where: Selection | BioState = None) -> Tensor:
    """Skewness of the logarithm of synaptic sizes: 0 for log-normal ones, those of cortex.

        skew = m3 / m2^(3/2),    m_k = mean of (ln|w| - mean ln|w|)^k over weights that are not 0

    Args:
        params: tree of parameters.
        where: which leaves count.

    Returns:
        0-d tensor; normal and uniform weights, with their many small ones, have about -1.5 and -2. NaN when all weights
        are 0 or all sizes equal.

    Raises:
        ValueError, TypeError, KeyError: a leaf is not floating point, or `where` selects nothing.

    Source: sizes of spines are log-normal, Loewenstein, Kuras, Rumpel 2011, doi 10.1523/JNEUROSCI.6130-10.2011.
    """
    return _log_moment(all_weights(params, where), 3)


def log_weight_kurtosis(params: Tree, *, where: Selection | BioState = None) -> Tensor:
    """Excess kurtosis of the logarithm of synaptic sizes: 0 for log-normal ones.

        kurtosis = m4 / m2^2 - 3,    m_k as for `log_weight_skew`

    Args:
        params: tree of parameters.
        where: which leaves count.

    Returns:
        0-d tensor, at least -2; normal and uniform weights have about 4 and 6. NaN when all weights are 0 or all sizes
        equal.

    Raises:
        ValueError, TypeError, KeyError: as for `log_weight_skew`.

    Source: as for `log_weight_skew`.
    """
    return _log_moment(all_weights(params, where), 4) - 3


def _presence(w: Tensor, threshold: float | Tensor, sign_flips: bool) -> Tensor:
    """+1 or -1 where a synapse is present, by its sign; 0 where there is none (or NaN)."""
    w = computed(w)
    size = w.abs()
    return torch.where(size > threshold, w.sign() if sign_flips else 1.0, 0.0)


def _log_moment(w: Tensor, order: int) -> Tensor:
    """Standardised central moment of ln|w| over the weights that are not 0."""
    present = w != 0
    count = present.sum()
    logs = torch.where(present, w, 1.0).abs().log()
    centred = torch.where(present, logs - torch.where(present, logs, 0.0).sum() / count, 0.0)
    variance = centred.square().sum() / count
    moment: Tensor = (centred**order).sum() / count / variance ** (order / 2)
    if w.numel() == 0:
        return moment
    # What is left of the variance of equal sizes is rounding
    equal = torch.where(present, logs, torch.inf).amin() == torch.where(present, logs, -torch.inf).amax()
    return torch.where(equal, torch.nan, moment)
