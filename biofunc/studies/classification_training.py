"""Training of the study of classification: the chains of a step, and the members of a group by the chunk."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import biofunc as bf
from biofunc import datasets
from biofunc.compare import CLASSES, compiler_works
from biofunc.studies.classification_arms import OFF, Group, arms

HELD_OUT = 0.2
"""Share of the samples for validation, and again for testing."""

CHUNK = 64
"""Members at a time, at most: their weights and moments then stay in the cache."""

COMPILE_FROM = 500
"""Ensemble steps from which compiling them pays."""

OPTIMIZERS: dict[str, Callable[[dict[str, Any]], list[bf.Rule]]] = {
    "sgd": lambda given: [],
    "momentum": lambda given: [bf.sgd(momentum=given["momentum"])],
    "adam": lambda given: [bf.adam()],
}


def make_steps(optimizer: list[bf.Rule], phase: str, nu: float | Tensor = 0.16) -> list[bf.Chain]:
    """The chains of a step, one after another.

    Mechanisms before an optimizer stand in a chain of their own: `chain` refuses fuzzy rates before Adam, because Adam
    divides them out again, and the study is to show just that.
    """
    shape = [partial(bf.volume_dependent_lr, base_lr=1.0, normalise=True), partial(bf.fuzzy_learning_rates, nu=nu)]
    if phase == "update":
        return [bf.chain(bf.crystallize, *optimizer, *shape, bf.descend(1.0))]
    return [bf.chain(bf.crystallize, *shape), bf.chain(*optimizer, bf.descend(1.0))]


TURNOVER = {
    "dre": bf.chain(bf.rejuvenate_weights),
    "random_dre": bf.chain(bf.named("random_turnover", partial(bf.rejuvenate_weights, selection="random"))),
}
"""What happens to the weights once in a period, in a call of its own: its noise is not drawn in between."""


def chunks_of(members: int) -> tuple[int, int]:
    """Number of chunks and their size: all of one size, so that one compilation serves them."""
    size = next(size for size in range(min(CHUNK, members), 0, -1) if members % size == 0)
    return members // size, size


class Training:
    """Trains members of a group, a chunk per call; compiled at the first."""

    def __init__(self, group: Group, data: datasets.Dataset) -> None:
        self.group, self.data = group, data
        self.seeds = int(group.study["seeds"])
        self.params, _ = bf.ensemble.init(self.make_model, range(self.seeds))
        with torch.device("meta"):  # the forward pass alone; members bring the parameters
            self.model = bf.split_synapses(self.make_model(), gamma=group.gamma)
        self.optimizer = OPTIMIZERS[group.optimizer](group.study["optimizers"][group.optimizer])
        self.chains = make_steps(self.optimizer, group.phase)
        self.step = torch.vmap(self.member_step)
        if group.task["steps"] * chunks_of(group.members)[0] >= COMPILE_FROM and compiler_works("cpu"):
            self.step = torch.compile(self.step, fullgraph=True)

    def make_model(self) -> nn.Module:
        features, hidden = self.data.inputs.shape[1], self.group.hidden
        return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, CLASSES))

    def member_step(self, params: Any, state: bf.BioState, hyper: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
        def loss(params: dict[str, Tensor]) -> Tensor:
            return nn.functional.cross_entropy(functional_call(self.model, params, (x,)), y)

        grads, step = grad(loss)(params), state.step
        shapes = {name: hyper[name] for name in ("dampening_factor", "stability_factor", "lr_variability")}
        *first, last = self.chains
        for chain in first:
            params, grads, state = chain(params, grads, state, **shapes)
            shapes, state = {}, state.replace(step=step)
        params, _, state = last(params, grads, state, lr=hyper["lr"], **shapes)
        return params, state

    def turn_over(self, params: Any, state: bf.BioState, hyper: dict[str, Tensor]) -> Any:
        """After a step, under that step's number."""
        step = state.step
        for name, chain in TURNOVER.items():
            params, _, state = chain(params, params, state.replace(step=step - 1), dre=hyper[name])
        return params, state

    def __call__(self, members: Tensor, advance: Callable[[int], None]) -> dict[str, list[Any]]:
        study, task, rates = self.group.study, self.group.task, self.group.rates
        settings = [arms(study)[arm] for arm in self.group.arms]
        of_arm, of_rate = members // (self.seeds * len(rates)), members // self.seeds % len(rates)
        of_seed = members % self.seeds
        hyper = {name: torch.tensor([float(arm[name]) for arm in settings])[of_arm] for name in OFF}
        hyper = {**hyper, "lr": torch.tensor(rates)[of_rate]}
        params = {name: p[of_seed] for name, p in self.params.items()}
        keys = bf.random.key(of_seed)

        def start(params: Any, key: Tensor, nu: Tensor) -> bf.BioState:
            rules = [*make_steps(self.optimizer, self.group.phase, nu), *TURNOVER.values()]
            return bf.init(params, key, *[rule for chain in rules for rule in chain.rules])

        state = torch.vmap(start)(params, keys, hyper["nu"])
        inputs, labels = self.data.inputs, self.data.labels
        train, validation, test = splits(keys, len(labels))
        x_test, y_test = inputs[test], labels[test]
        turns_over = bool(torch.isfinite(torch.cat([hyper[name] for name in TURNOVER])).any())
        evaluations = min(study["evaluations"], task["steps"])
        evaluated = [round(task["steps"] * (i + 1) / evaluations) for i in range(evaluations)]
        curve = []
        for number, batch in enumerate(batches(keys, train, study["batch"], task["steps"]), start=1):
            params, state = self.step(params, state, hyper, inputs[batch], labels[batch])
            if turns_over and number % task["turnover_period"] == 0:
                params, state = torch.vmap(self.turn_over)(params, state, hyper)
            if number in evaluated:
                curve.append(self.accuracy(params, x_test, y_test))
            advance(1)
        accuracies = torch.stack(curve, 1)
        return {
            "validation accuracy": self.accuracy(params, inputs[validation], labels[validation]).tolist(),
            "test accuracy": accuracies[:, -1].tolist(),
            f"steps to {task['level']:.0%}": [
                next((float(step) for step, a in zip(evaluated, own, strict=True) if a >= task["level"]), math.inf)
                for own in accuracies.tolist()
            ],
            "curve test accuracy": accuracies.tolist(),
        }

    def accuracy(self, params: Any, x: Tensor, y: Tensor) -> Tensor:
        predict = torch.vmap(lambda params, x: functional_call(self.model, params, (x,)).argmax(-1))
        hits: Tensor = predict(params, x) == y
        return hits.double().mean(-1)


def splits(keys: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of each member's training (60 %), validation (20 %) and test samples (20 %)."""
    order = bf.random.uniform(bf.random.fold_in(keys, "split"), (samples,)).argsort(-1)
    held_out = int(samples * HELD_OUT)
    return order[:, 2 * held_out :], order[:, held_out : 2 * held_out], order[:, :held_out]


def batches(keys: Tensor, train: Tensor, batch: int, steps: int) -> Iterator[Tensor]:
    """Indices of each member's batches, `(members, batch)`, in an order that is new in every epoch."""
    keys = bf.random.fold_in(keys, "order")
    per_epoch = train.shape[1] // batch
    for number in range(steps):
        if number % per_epoch == 0:
            draws = bf.random.uniform(bf.random.fold_in(keys, number // per_epoch), (train.shape[1],))
            shuffled = train.gather(1, draws.argsort(-1))
        position = number % per_epoch * batch
        yield shuffled[:, position : position + batch]
