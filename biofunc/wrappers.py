"""Modules inside wrappers: what torch.compile and data parallelism put around a model."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

__all__ = ["parallel_wrapper", "unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, whose parameters have the names without "_orig_mod." and "module."."""
    while True:
        inner = _inside(model)
        if inner is None:
            return model
        model = inner


def parallel_wrapper(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a model, if there is one.

    Args:
        model: a module, wrapped or not.

    Returns:
        The outermost such wrapper; None if there is none.
    """
    current: nn.Module | None = model
    while current is not None:
        if isinstance(current, DistributedDataParallel):
            return current
        current = _inside(current)
    return None


def _inside(model: nn.Module) -> nn.Module | None:
    parallel = isinstance(model, DistributedDataParallel | DataParallel)
    inner = model.module if parallel else getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else None
