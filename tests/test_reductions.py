"""Statistics of a leaf against the finite values alone, whatever is broken, alone and batched."""

import pytest
import torch

from biofunc.reductions import finite_max, finite_mean, finite_min

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
