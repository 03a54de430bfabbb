"""Victims of gradient inversion: networks of all seeds, trained on their own images with a defence at work."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import biofunc as bf
from biofunc import datasets
from biofunc.studies.gradient_noise import gradient_noise
from biofunc.studies.gradient_pruning import gradient_pruning
from biofunc.trees import Leaves

CLASSES = 10
TEST_SHARE = 0.2

Attack = Literal["closed form", "cosine"]
Defended = Literal["weights", "weights and biases"]
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Task:
    """One attack on one data set."""

    attack: Attack
    data: str
    size: int
    defended: Defended

    @property
    def name(self) -> str:
        return f"{self.attack}, {self.data}, {self.defended}"


@dataclasses.dataclass(frozen=True)
class Defence:
    """What happens to a gradient before it is shared; as constructed, nothing."""

    nu: float = 0.0
    dampening_factor: float = 1.0
    stability_factor: float = 0.0
    lr_variability: float = 0.0
    gamma: int = 1
    noise: float = 0.0
    pruning: float = 0.0

    def rules(self) -> list[Any]:
        """The rules of the defence alone: what it does not use would draw noise in vain."""
        rules: list[Any] = []
        if self.dampening_factor < 1:
            rules.append(partial(bf.crystallize, dampening_factor=self.dampening_factor))
        if self.stability_factor > 0 or self.lr_variability > 0:
            rules.append(
                partial(
                    bf.volume_dependent_lr,
                    base_lr=1.0,
                    stability_factor=self.stability_factor,
                    lr_variability=self.lr_variability,
                    normalise=True,
                )
            )
        rules.append(partial(bf.fuzzy_learning_rates, nu=self.nu))
        if self.noise > 0:
            rules.append(partial(gradient_noise, strength=self.noise))
        if self.pruning > 0:
            rules.append(partial(gradient_pruning, share=self.pruning))
        return rules


@dataclasses.dataclass(frozen=True)
class Victims:
    """Private data and trained networks of all seeds; the first axis is the seed's."""

    model: nn.Module
    params: Leaves
    state: bf.BioState
    innate: Leaves  # the rates with which synapses were born
    accuracy: Tensor  # on test images, (seeds,)


@dataclasses.dataclass(frozen=True)
class Data:
    """Images, labels and, per seed, which of them train, test and stay private."""

    images: Tensor  # (samples, height, width)
    labels: Tensor
    keys: Tensor
    train: Tensor
    test: Tensor
    private: Tensor

    def truth(self) -> Tensor:
        """The image of each seed that is measured."""
        return self.images[self.private[:, 0]]

    def mean_image(self) -> Tensor:
        """The best guess without a gradient, from each seed's training images."""
        return torch.stack([self.images[index].mean(0) for index in self.train])


class Convolution(nn.Conv2d):
    """A square convolution with zero padding, as one matrix product.

    Under `vmap` with weights of its own for each member, a convolution is a grouped one; the second derivatives of the
    attack then took 1.4 to 1.5 times as long on one thread of a CPU, and far longer on two that were not free.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        height, width = [(n + 2 * padding - kernel) // stride + 1 for n in x.shape[-2:]]
        columns = nn.functional.unfold(x, kernel, padding=padding, stride=stride)
        bias = 0.0 if self.bias is None else self.bias.unsqueeze(-1)
        product = self.weight.flatten(1) @ columns + bias
        return product.reshape(*product.shape[:-1], height, width)


def load(study: dict[str, Any], task: Task) -> Data:
    """Loads the images and deals them out; what a seed gets depends on the seed alone."""
    found = datasets.load(task.data)
    side = math.isqrt(found.inputs.shape[1])
    images = found.inputs.reshape(-1, 1, side, side)
    images = nn.functional.avg_pool2d(images, side // task.size).squeeze(1)
    keys = bf.random.key(torch.arange(study["seeds"]))
    order = bf.random.uniform(bf.random.fold_in(keys, "split"), (len(images),)).argsort(-1)
    private, held_out = study["images"], study["images"] + int(len(images) * TEST_SHARE)
    return Data(images, found.labels, keys, order[:, held_out:], order[:, private:held_out], order[:, :private])


def make_model(task: Task, hidden: int) -> nn.Module:
    """The victim's network: a perceptron, or two convolutions with sigmoids and a linear layer."""
    if task.attack == "closed form":
        return nn.Sequential(nn.Flatten(), nn.Linear(task.size**2, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))
    convolutions = Convolution(1, hidden, 3, padding=1), Convolution(hidden, hidden, 3, stride=2, padding=1)
    for layer in convolutions:
        # Glorot's bound for the logistic function; with PyTorch's own the network does not leave chance
        nn.init.xavier_uniform_(layer.weight, gain=4.0)
    return nn.Sequential(
        nn.Unflatten(-2, (1, task.size)),
        convolutions[0],
        nn.Sigmoid(),
        convolutions[1],
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(hidden * ((task.size + 1) // 2) ** 2, CLASSES),
    )


def train_victims(study: dict[str, Any], task: Task, data: Data, advance: Advance, defence: Defence) -> Victims:
    """Trains the networks of all seeds with a defence at work; initial weights, batches and noise are the seed's."""
    network, seeds = study["networks"][task.attack], len(data.keys)
    params, _ = bf.ensemble.init(lambda: make_model(task, network["hidden"]), range(seeds))
    with torch.device("meta"):  # the forward pass alone
        model = make_model(task, network["hidden"])
    if defence.gamma > 1:
        model = bf.split_synapses(model, defence.gamma)
    learn = bf.chain(*defence.rules(), bf.descend(network["lr"]))
    where = None if task.defended == "weights" else "*"
    state = torch.vmap(lambda p, k: learn.init(p, k, where=where))(params, data.keys)
    innate = state.plasticity
    gradient = grad(partial(loss, model))

    @torch.vmap
    def step(params: Leaves, state: bf.BioState, x: Tensor, y: Tensor) -> tuple[Leaves, bf.BioState]:
        params, _, state = learn(params, gradient(params, x, y), state)
        return params, state

    order = bf.random.fold_in(data.keys, "order")
    for number in range(study["steps"]):
        draw = bf.random.uniform(bf.random.fold_in(order, number), (network["batch"],))
        batch = data.train.gather(1, (draw * data.train.shape[1]).long())
        params, state = step(params, state, data.images[batch], data.labels[batch])
        advance(1)
    predicted = torch.vmap(lambda p, x: functional_call(model, p, (x,)).argmax(-1), chunk_size=4)(
        params, data.images[data.test]
    )
    accuracy = (predicted == data.labels[data.test]).float().mean(-1)
    return Victims(model, params, state, innate, accuracy)


def loss(model: nn.Module, params: Leaves, x: Tensor, y: Tensor) -> Tensor:
    """The loss of which victims share the gradient: the mean cross-entropy of a batch.

    Args:
        model: the network.
        params: its parameters by name.
        x: images `(batch, height, width)`.
        y: labels `(batch,)`.

    Returns:
        0-d.
    """
    return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)
