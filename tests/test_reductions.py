"""Statistics of a leaf against the finite values alone, whatever is broken, alone and batched."""

import pytest
import torch

from biofunc.reductions import finite_max, finite_mean, finite_means, finite_min

BROKEN = [[], [float("nan")], [float("inf"), float("nan")], [float("nan")] * 99]


@pytest.mark.parametrize("broken", BROKEN)
def test_reductions_leave_out_what_is_not_finite(broken):
    values = torch.linspace(0.25, 3.0, 99, dtype=torch.float64).reshape(9, 11).clone()
    values.view(-1)[: len(broken)] = torch.tensor(broken, dtype=torch.float64)
    kept = values[values.isfinite()]
    for reduce, expected in [
        (finite_mean, kept.mean() if len(kept) else torch.zeros(())),
        (finite_max, kept.amax() if len(kept) else torch.zeros(())),
        (finite_min, kept.amin() if len(kept) else torch.tensor(torch.inf)),
    ]:
        torch.testing.assert_close(reduce(values), expected.double())
        both = torch.vmap(reduce)(torch.stack([values, torch.ones_like(values)]))
        torch.testing.assert_close(both, torch.stack([expected.double(), torch.ones((), dtype=torch.float64)]))


def test_the_mean_of_signed_values_leaves_out_both_infinities():
    assert finite_mean(torch.tensor([-torch.inf, torch.inf, -2.0, 4.0])).item() == 1.0


@pytest.mark.parametrize("broken", BROKEN)
def test_means_of_leaves_that_are_finite_at_the_same_places_are_those_of_each(broken):
    values = torch.linspace(-1.5, 3.0, 99).reshape(9, 11).clone()
    values.view(-1)[: len(broken)] = torch.tensor(broken)
    together = finite_means(values, values.abs())
    assert torch.equal(torch.stack(together), torch.stack([finite_mean(values), finite_mean(values.abs())]))
    kept = values[values.isfinite()]
    expected = kept.abs().mean() if len(kept) else torch.zeros(())
    # Sums of 99 numbers in two orders
    torch.testing.assert_close(together[1], expected, rtol=1e-6, atol=0)
