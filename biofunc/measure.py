"""Measures of networks that learn: how synapses turn over, how plastic they still are, what neurons still do.

All are pure functions of tensors that can be vmapped and compiled; they look on, so no gradient flows through them.
A measure takes all synapses of a tree together: leaves of two or more dimensions, or all leaves of a tree that has none
(a single bias, activities). `where=` names others as in `Chain.init` does; `where=state` stands for the synapses of a
`BioState`. One value per leaf:

    {path: bf.measure.turnover(before, after, where=path) for path in state.plasticity}

Members of an ensemble are measured under `torch.vmap`: without it a stack is one large network, whose biases have two
dimensions and count as synapses; where leaves are called bias, that is warned of. Values that are not finite are left
out, and where nothing is left to measure the result is NaN.
"""

from biofunc.measure_plasticity import (
    crystallised_fraction,
    effective_number_of_rates,
    rate_spectrum,
    response_probe,
)
from biofunc.measure_units import dead_unit_fraction, effective_rank
from biofunc.measure_weights import (
    dale_consistency,
    log_weight_kurtosis,
    log_weight_skew,
    sign_balance,
    survival,
    turnover,
)

__all__ = [
    "crystallised_fraction",
    "dale_consistency",
    "dead_unit_fraction",
    "effective_number_of_rates",
    "effective_rank",
    "log_weight_kurtosis",
    "log_weight_skew",
    "rate_spectrum",
    "response_probe",
    "sign_balance",
    "survival",
    "turnover",
]
