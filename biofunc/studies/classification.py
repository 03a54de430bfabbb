"""Classification: arms with a tuned learning rate each, on small data sets, before and behind several optimizers.

All arms, learning rates and seeds that share a forward pass are members of one ensemble: a mechanism that an arm does
not have is at its off setting. A seed fixes the split, the initial weights, the batches and the noise of every arm. The
learning rate of an arm is chosen on validation data and reported on test data, with the same number of trials for all.
"""

import dataclasses
import itertools
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
from biofunc.studies import Job, Results

HELD_OUT = 0.2
"""Share of the samples for validation, and again for testing."""

CHUNK = 64
"""Members at a time, at most: their weights and moments then stay in the cache."""

COMPILE_FROM = 500
"""Ensemble steps from which compiling them pays."""

OFF: dict[str, float] = {
    "nu": 0.0,
    "stability_factor": 0.0,
    "lr_variability": 0.0,
    "dampening_factor": 1.0,
    "dre": math.inf,
    "random_dre": math.inf,
    "gamma": 1,
    "width": 1.0,
}
"""What an arm may set, and the value at which nothing happens. `random_dre` is `dre` of the control that re-draws any
synapse, not the weak ones, at the same turnover; `width` is the share of the hidden units that is kept."""

SHAPES_DIRECTION = ("nu", "stability_factor", "lr_variability", "dampening_factor")
"""Settings that matter differently before and behind an optimizer."""

OPTIMIZERS: dict[str, Callable[[dict[str, Any]], list[bf.Rule]]] = {
    "sgd": lambda given: [],
    "momentum": lambda given: [bf.sgd(momentum=given["momentum"])],
    "adam": lambda given: [bf.adam()],
}

Arm = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """Arms that are trained as one ensemble: one data set, optimizer, phase and forward pass."""

    study: dict[str, Any]
    data: str
    optimizer: str
    phase: str
    gamma: int
    hidden: int
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        """What tells it from the others."""
        network = f"split {self.gamma}" if self.gamma > 1 else f"{self.hidden} hidden"
        return f"{self.data} {self.optimizer} {self.phase} {network}"

    @property
    def rates(self) -> list[float]:
        """The learning rates that are tried."""
        rates: list[float] = self.study["optimizers"][self.optimizer]["lr"]
        return rates

    @property
    def task(self) -> dict[str, Any]:
        """The settings of the data set."""
        task: dict[str, Any] = self.study["data"][self.data]
        return task

    @property
    def members(self) -> int:
        """Arm by arm, rate by rate, seed by seed."""
        return len(self.arms) * len(self.rates) * int(self.study["seeds"])


def check(study: dict[str, Any]) -> None:
    """Raises a ValueError of one line for what cannot be run."""
    for name in study["data"]:
        if name not in datasets.DATASETS:
            raise ValueError(f"[data.{name}]: the data sets are {', '.join(datasets.DATASETS)}")
    for name, given in study["optimizers"].items():
        if name not in OPTIMIZERS:
            raise ValueError(f"[optimizers.{name}]: the optimizers are {', '.join(OPTIMIZERS)}")
        if not given["lr"] or not all([rate > 0 for rate in given["lr"]]):
            raise ValueError(f"[optimizers.{name}]: lr is {given['lr']}; give a list of positive numbers")
    for phase in study["phases"]:
        if phase not in ("gradient", "update"):
            raise ValueError(f"phases holds '{phase}'; it must be gradient or update")
    for name, given in [*study.get("arms", {}).items(), *study.get("factors", {}).items()]:
        for setting in given:
            if setting not in OFF:
                raise ValueError(f"'{name}' sets '{setting}'; it may set {', '.join(OFF)}")
    control = study["decision"]["control"]
    if control not in arms(study):
        raise ValueError(f"[decision]: control is '{control}'; the arms are {', '.join(arms(study))}")
    for left, right in study.get("controls", {}).items():
        for arm in (left, right):
            if arm not in arms(study):
                raise ValueError(f"[controls]: '{arm}' is no arm; the arms are {', '.join(arms(study))}")
    for name, task in study["data"].items():
        for setting in ("hidden", "steps", "turnover_period"):
            if not isinstance(task[setting], int) or task[setting] < 1:
                raise ValueError(f"[data.{name}]: {setting} is {task[setting]!r}; give a positive integer")
        for arm in arms(study).values():
            if int(task["hidden"] * arm["width"]) % int(arm["gamma"]):
                raise ValueError(f"[data.{name}]: gamma {arm['gamma']} does not divide the hidden units")


def arms(study: dict[str, Any]) -> dict[str, Arm]:
    """The arms of a study with all their settings: its `[arms]`, or every subset of its `[factors]`.

    An arm of factors is called by their names, "crystallize + weight_splitting"; the one without any is "plain".
    """
    factors = study.get("factors", {})
    subsets = [chosen for n in range(len(factors) + 1) for chosen in itertools.combinations(factors, n)]
    combined = {
        " + ".join(chosen) or "plain": {k: v for name in chosen for k, v in factors[name].items()} for chosen in subsets
    }
    given = study["arms"] if not factors else combined
    return {name: {**OFF, **settings} for name, settings in given.items()}


def jobs(study: dict[str, Any]) -> list[Job]:
    """One job for each data set, optimizer, phase and forward pass."""
    return [
        Job(group.name, group.task["steps"] * _chunks(group.members)[0], partial(_run, group))
        for group in groups(study)
    ]


def groups(study: dict[str, Any]) -> list[Group]:
    """What is trained together. Arms that no phase changes are trained in the first phase only."""
    made = []
    for data, optimizer in itertools.product(study["data"], study["optimizers"]):
        for phase in _phases(study, optimizer):
            networks: dict[tuple[int, int], list[str]] = {}
            for name, arm in arms(study).items():
                if phase == study["phases"][0] or _depends_on_phase(arm):
                    network = int(arm["gamma"]), int(study["data"][data]["hidden"] * arm["width"])
                    networks.setdefault(network, []).append(name)
            for (gamma, hidden), chosen in networks.items():
                made.append(Group(study, data, optimizer, phase, gamma, hidden, tuple(chosen)))
    return made


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


def _phases(study: dict[str, Any], optimizer: str) -> list[str]:
    phases: list[str] = study["phases"]
    return phases[:1] if optimizer == "sgd" else phases  # nothing stands between gradient and update


def _depends_on_phase(arm: Arm) -> bool:
    return any([arm[setting] != OFF[setting] for setting in SHAPES_DIRECTION])


def _conditions(group: Group, arm: str) -> list[str]:
    """The conditions to which an arm of a group belongs."""
    phases = _phases(group.study, group.optimizer)
    if len(phases) == 1:
        return [f"{group.data}, {group.optimizer}"]
    shared = not _depends_on_phase(arms(group.study)[arm])
    return [f"{group.data}, {group.optimizer}, {p} phase" for p in (phases if shared else [group.phase])]


def _chunks(members: int) -> tuple[int, int]:
    """Number of chunks and their size: all of one size, so that one compilation serves them."""
    size = next(size for size in range(min(CHUNK, members), 0, -1) if members % size == 0)
    return members // size, size


def _run(group: Group, advance: Callable[[int], None]) -> Results:
    data = datasets.load(group.data)
    torch.compiler.reset()  # else the steps of many groups count as recompilations of one
    train = _Training(group, data)
    chunks, size = _chunks(group.members)
    parts = [train(torch.arange(i * size, (i + 1) * size), advance) for i in range(chunks)]
    metrics = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    results: Results = {}
    seeds = group.study["seeds"]
    for start, (arm, rate) in zip(
        range(0, group.members, seeds), itertools.product(group.arms, group.rates), strict=True
    ):
        for condition in _conditions(group, arm):
            own = {name: values[start : start + seeds] for name, values in metrics.items()}
            results.setdefault(condition, {}).setdefault(arm, {})[f"lr={rate:g}"] = own
    return results


class _Training:
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
        if group.task["steps"] * _chunks(group.members)[0] >= COMPILE_FROM and compiler_works("cpu"):
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
