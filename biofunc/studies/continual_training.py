"""Training of the study of continual learning: tasks, batches, members by the chunk, and the metrics of each."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import grad

import biofunc as bf
from biofunc import datasets
from biofunc.compare import compiler_works
from biofunc.state import BioState
from biofunc.studies.continual_chains import OFF, REDRAWING, Hyper, hyperparameters, make_chain, make_periodic_chain
from biofunc.trees import Leaves

HIDDEN = 50
CLASSES = 10
BATCH = 20
CHUNK = 20
"""Members that run at once: the states of more of them leave the cache."""

LAST, FIRST = 5, 3
"""Tasks over which the end and the beginning of a run are averaged."""

SILENT = 0.01
"""Share of the layer's mean activity below which scaling counts a neuron as dead and leaves it alone."""

Observed: TypeAlias = tuple[Tensor, tuple[Tensor, Leaves]]
"""A loss, and beside it outputs and activity; the compiler refuses such a type inside a function that it traces."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One run: an arm in one setting, from one seed, at one learning rate."""

    arm: str
    setting: Mapping[str, float]
    lr: float
    seed: int


def make_model() -> nn.Module:
    """The network of the study: 64 - 50 - 50 - 10, ReLU."""
    return nn.Sequential(
        nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


def task_data(task: str, data: datasets.Dataset, samples: int, keys: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The inputs and labels of a task; those of a seed depend on its key and the number of the task alone.

    Args:
        task: one of `TASKS`.
        data: the digits.
        samples: how many of them a seed has; which, stays the same over its tasks.
        keys: int64 `(seeds, 2)`.
        number: of the task, from 0.

    Returns:
        Inputs `(seeds, samples, 64)` and labels `(seeds, samples)`.
    """
    chosen = bf.random.uniform(bf.random.fold_in(keys, "digits"), (len(data.labels),)).argsort(-1)[:, :samples]
    inputs, labels = data.inputs[chosen], data.labels[chosen]
    key = bf.random.fold_in(bf.random.fold_in(keys, task), number)
    if task == "random_label_digits":
        return inputs, bf.random.uniform(key, (samples,)).argsort(-1) % CLASSES
    pixels = bf.random.uniform(key, (inputs.shape[-1],)).argsort(-1)
    return inputs.gather(-1, pixels.unsqueeze(1).expand(inputs.shape)), labels


def batches(samples: int, epochs: int, keys: Tensor, number: int) -> Tensor:
    """Indices of the batches of a task, `(steps, seeds, BATCH)`, in an order that is new in every epoch."""
    per_epoch = samples // BATCH
    key = bf.random.fold_in(bf.random.fold_in(keys, "order"), number)
    order = bf.random.uniform(key, (epochs, samples)).argsort(-1)[:, :, : per_epoch * BATCH]
    return order.reshape(len(keys), epochs * per_epoch, BATCH).transpose(0, 1).contiguous()


class Trainer:
    """Trains members on the tasks of one kind with one optimizer; the step is compiled once per group of arms."""

    def __init__(self, task: str, optimizer: str, plan: Mapping[str, int], *, chunk: int = CHUNK) -> None:
        self.task, self.optimizer, self.plan, self.chunk = task, optimizer, plan, chunk
        self.data = datasets.load("digits")
        with torch.device("meta"):  # the forward pass alone; members bring the parameters
            self.record = bf.record_activity(make_model())
        self.step = torch.vmap(self._step)
        if compiler_works("cpu"):
            bf.random.accelerate()
            torch.compiler.reset()  # the steps of earlier jobs count against the limit of recompilations
            self.step = torch.compile(self.step, fullgraph=True)

    def train(self, members: Sequence[Member], advance: Callable[[int], None]) -> list[dict[str, Any]]:
        """Metrics of each member by name; which members share a chunk means nothing for them."""
        results: dict[int, dict[str, Any]] = {}
        # The moments of dead units decay into denormal numbers, which made a step up to five times slower
        torch.set_flush_denormal(True)
        try:
            for redraws in (False, True):
                group = [i for i, member in enumerate(members) if (member.arm in REDRAWING) == redraws]
                for start in range(0, len(group), self.chunk):
                    part = group[start : start + self.chunk]
                    filled = part + [part[-1]] * (self.chunk - len(part))
                    found = self._train_chunk([members[i] for i in filled], redraws, advance)
                    results.update(zip(part, found, strict=False))
        finally:
            torch.set_flush_denormal(False)
        return [results[i] for i in range(len(members))]

    def _train_chunk(
        self, members: Sequence[Member], redraws: bool, advance: Callable[[int], None]
    ) -> list[dict[str, Any]]:
        samples, epochs, period = self.plan["samples"], self.plan["epochs"], self.plan["period"]
        keys = bf.random.key(torch.tensor([member.seed for member in members]))
        lr = torch.tensor([member.lr for member in members])
        hyper = _stacked([hyperparameters(member.arm, member.setting) for member in members])
        params, _ = bf.ensemble.init(make_model, [member.seed for member in members])
        state = torch.vmap(partial(self._init, redraws=redraws))(params, keys, hyper)
        renew = torch.vmap(partial(_renew, redraws=redraws))
        rows = torch.arange(len(members)).unsqueeze(1)
        tasks, steps = [], 0
        for number in range(self.plan["tasks"]):
            inputs, labels = task_data(self.task, self.data, samples, keys, number)
            correct, turnover = torch.zeros(len(members)), torch.zeros(len(members))
            for batch in batches(samples, epochs, keys, number):
                x, y = inputs[rows, batch], labels[rows, batch]
                params, state, correct = self.step(params, state, hyper, lr, correct, x, y)
                steps += 1
                if steps % period == 0:
                    params, state = renew(params, state, hyper)
                    turnover = turnover + _newborn(state)
                advance(1)
            dead, rank = torch.vmap(silence_and_rank)(params, inputs)
            tasks.append(torch.stack([correct / (epochs * (samples // BATCH)), turnover, dead, rank], -1))
        return [summary(member) for member in torch.stack(tasks, 1)]

    def _init(self, params: Leaves, key: Tensor, hyper: Hyper, *, redraws: bool) -> BioState:
        step, periodic = make_chain(self.optimizer, 0.0, hyper), make_periodic_chain(hyper, redraws=redraws)
        return bf.init(params, key, *step.rules, *periodic.rules)

    def _step(
        self,
        params: Leaves,
        state: BioState,
        hyper: Hyper,
        lr: Tensor,
        correct: Tensor,
        x: Tensor,
        y: Tensor,
    ) -> tuple[Leaves, BioState, Tensor]:
        """One step of one member; `correct` sums the accuracies of the batches before the steps."""

        def loss(params: Leaves) -> Observed:
            y_hat, activity = self.record(params, {}, x)
            return nn.functional.cross_entropy(y_hat, y), (y_hat, activity)

        grads, (y_hat, activity) = grad(loss, has_aux=True)(params)
        # nu acts at init
        learn = make_chain(self.optimizer, lr, {**hyper, "fuzzy_learning_rates": {}})
        params, _, state = learn(params, grads, state, activity=activity, target=_target(state))
        return params, state, correct + (y_hat.argmax(-1) == y).float().mean()


def _renew(params: Leaves, state: BioState, hyper: Hyper, *, redraws: bool) -> tuple[Leaves, BioState]:
    """The periodic rules, as if they stood at the end of the chain of the step that was just made."""
    renew = make_periodic_chain(hyper, redraws=redraws)
    params, _, state = renew(params, params, state.replace(step=state.step - 1))
    return params, state


def _target(state: BioState) -> Leaves:
    """The activity that scaling aims at: the mean of the layer, and none for a dead neuron, which no factor wakes."""
    return {path: torch.where(a > SILENT * a.mean(), a.mean(), torch.nan) for path, a in state.activity.items()}


def _newborn(state: BioState) -> Tensor:
    """Share of the synapses of each member that the last period re-drew."""
    periods = torch.cat([leaf.flatten(1) for leaf in state.slots["age"]["periods"].values()], 1)
    return (periods == 0).float().mean(1)


def silence_and_rank(params: Leaves, x: Tensor) -> tuple[Tensor, Tensor]:
    """The share of hidden units that are silent for all inputs, and the effective rank of the last hidden layer.

    The effective rank of activities H (samples, units) with singular values s is exp(entropy of s / sum s) (Roy,
    Vetterli 2007); 0 where no unit is active.
    """
    first = torch.relu(nn.functional.linear(x, params["0.weight"], params["0.bias"]))
    second = torch.relu(nn.functional.linear(first, params["2.weight"], params["2.bias"]))
    silent = torch.cat([(first <= 0).all(0), (second <= 0).all(0)]).float().mean()
    gram = (second.mT @ second).double()
    singular = torch.linalg.eigvalsh(torch.nan_to_num(gram, posinf=0.0)).clamp(min=0).sqrt()
    share = singular / singular.sum()
    rank = torch.special.entr(share).sum().exp()
    return silent, torch.where(singular.sum() > 0, rank, 0.0).float()


def summary(tasks: Tensor) -> dict[str, Any]:
    """Metrics of one member out of `(tasks, 4)`: accuracy, turnover, dead units and effective rank of each task."""
    accuracy, turnover, dead, rank = tasks.double().unbind(-1)
    last, first = accuracy[-LAST:].mean(), accuracy[:FIRST].mean()
    return {
        "mean online accuracy": accuracy.mean().item(),
        "last-5 accuracy": last.item(),
        "first-3 accuracy": first.item(),
        "last/first": (last / first).item(),
        "dead units": dead[-LAST:].mean().item(),
        "effective rank": rank[-LAST:].mean().item(),
        "turnover": turnover.mean().item(),
        "curve online accuracy": accuracy.tolist(),
        "curve dead units": dead.tolist(),
    }


def _stacked(hyper: Sequence[Hyper]) -> Hyper:
    """One value per member."""
    return {
        rule: {name: torch.tensor([float(member[rule][name]) for member in hyper]) for name in OFF[rule]}
        for rule in OFF
    }
