"""Learning one task after another: does a network stay able to learn?

A network that has learnt many tasks learns the next one worse: units die, weights grow. Each arm has one mechanism, or
one of the rivals from machine learning, and meets the same tasks:

    random_label_digits    the same digits, each time with new random labels, ten of equally many: a network that knows
                           nothing comes to 0.1, and below where it repeats what it has just seen
    permuted_digits        all digits with their own labels, each time with their pixels in a new random order

What counts is the online accuracy: of each batch before the network learns from it, averaged over a task.

All arms are one chain in which mechanisms that an arm does not have are off, so that one compilation serves them. A
seed fixes tasks, order of the batches, initial weights and noise, for every arm. The strength of a mechanism is chosen
on tuning seeds, and judged on others.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor, nn
from torch.func import grad

import biofunc as bf
from biofunc import datasets
from biofunc.compare import compiler_works
from biofunc.state import BioState
from biofunc.studies import Job, Results
from biofunc.studies.l2_init import l2_init
from biofunc.studies.shrink_and_perturb import shrink_and_perturb
from biofunc.trees import Leaves

HIDDEN = 50
CLASSES = 10
DIGITS = 1797
BATCH = 20
CHUNK = 20
"""Members that run at once: the states of more of them leave the cache."""

LAST, FIRST = 5, 3
"""Tasks over which the end and the beginning of a run are averaged."""

SILENT = 0.01
"""Share of the layer's mean activity below which scaling counts a neuron as dead and leaves it alone."""

TASKS = ("random_label_digits", "permuted_digits")
OPTIMIZERS = ("sgd", "adam")

Observed: TypeAlias = tuple[Tensor, tuple[Tensor, Leaves]]
"""A loss, and beside it outputs and activity; the compiler refuses such a type inside a function that it traces."""

Hyper: TypeAlias = dict[str, dict[str, Any]]
OFF: Hyper = {
    "l2_init": {"strength": 0.0},
    "crystallize": {"dampening_factor": 1.0, "floor": 0.0, "recovery": 0.0},
    "fuzzy_learning_rates": {"nu": 0.0},
    "synaptic_scaling": {"rate": 0.0},
    "rejuvenate_weights": {"rate": 0.0},
    "random_turnover": {"rate": 0.0},
    "shrink_and_perturb": {"shrink": 0.0, "perturb": 0.0},
}
"""Hyperparameters of the mechanisms under which all of them are the identity."""

ARMS = {"plain": None, **{rule: rule for rule in OFF}, "crystallize_recovering": "crystallize"}
"""The mechanism of each arm."""

REDRAWING = ("rejuvenate_weights", "random_turnover")
"""Arms that need the state of re-drawn synapses; the others run as a group without it, with the same numbers."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One run: an arm in one setting, from one seed, at one learning rate."""

    arm: str
    setting: Mapping[str, float]
    lr: float
    seed: int


def check(study: Mapping[str, Any]) -> None:
    """Raises a ValueError with one line if the study names what there is not, or holds a number out of its range."""
    for kind, known in (("tasks", TASKS), ("optimizers", OPTIMIZERS), ("arms", ARMS)):
        if not study.get(kind):
            raise ValueError(f"the study has no {kind}; give one or more of {', '.join(known)}")
        for name in study[kind]:
            if name not in known:
                raise ValueError(f"{kind} holds '{name}'; it must be one of {', '.join(known)}")
    if "plain" not in study["arms"]:
        raise ValueError("arms lacks 'plain'; the learning rate is chosen with it")
    for name, task in study["tasks"].items():
        limits = {
            "samples": (BATCH, DIGITS),
            "tasks": (LAST, math.inf),
            "epochs": (1, math.inf),
            "period": (1, math.inf),
        }
        for key, (least, most) in limits.items():
            value = task.get(key)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"tasks.{name}.{key} is {value!r}; it must be an integer in [{least}, {most}]")
    for name, optimizer in study["optimizers"].items():
        rates = optimizer.get("lr")
        if not rates or any(isinstance(lr, bool) or not isinstance(lr, int | float) or not lr > 0 for lr in rates):
            raise ValueError(f"optimizers.{name}.lr is {rates!r}; it must be a list of positive numbers")
    for arm, settings in study["arms"].items():
        mechanism = ARMS[arm]
        known = OFF[mechanism] if mechanism else {}
        if not settings:
            raise ValueError(f"arms.{arm} has no setting; give a list of tables of {', '.join(known) or 'nothing: {}'}")
        for setting in settings:
            for key in setting:
                if key not in known:
                    raise ValueError(f"arms.{arm} sets '{key}'; it takes {', '.join(known) or 'nothing'}")
            try:
                make_chain("sgd", 0.1, _hyperparameters(arm, setting))
                make_periodic_chain(_hyperparameters(arm, setting), redraws=True)
            except (TypeError, ValueError) as error:
                raise ValueError(f"arms.{arm}: {error}") from error
    seeds = study.get("tuning_seeds")
    if not seeds or any(isinstance(seed, bool) or not isinstance(seed, int) for seed in seeds):
        raise ValueError(f"tuning_seeds is {seeds!r}; it must be a list of integers")
    if any(0 <= seed < study["seeds"] for seed in seeds):
        raise ValueError(f"tuning_seeds {seeds} meet the {study['seeds']} seeds of the comparison; choose others")


def jobs(study: Mapping[str, Any]) -> list[Job]:
    """One job per task and optimizer: the strengths of all arms are tuned, then the chosen ones compared.

    Args:
        study: a study that `check` lets pass.

    Returns:
        The jobs. A result holds "tuning accuracy", one value per tuning seed, of every setting, and all other metrics,
        one value per seed, of the chosen setting of each arm.
    """
    return [
        Job(
            f"{task} {optimizer}",
            _steps(study["tasks"][task]) * _chunks(study, optimizer),
            partial(_run, study, task, optimizer),
        )
        for task in study["tasks"]
        for optimizer in study["optimizers"]
    ]


def make_chain(optimizer: str, lr: Any, hyper: Hyper) -> bf.Chain:
    """What every arm does at each step: mechanisms that it does not have are off.

    Args:
        optimizer: "sgd" or "adam".
        lr: learning rate.
        hyper: hyperparameters by mechanism, as in `OFF`.

    Returns:
        The chain.
    """
    return bf.chain(
        partial(l2_init, **hyper["l2_init"]),
        partial(bf.crystallize, **hyper["crystallize"]),
        *([bf.adam()] if optimizer == "adam" else []),
        partial(bf.fuzzy_learning_rates, **hyper["fuzzy_learning_rates"]),
        bf.descend(lr),
        bf.where(_is_hidden, partial(bf.synaptic_scaling, **hyper["synaptic_scaling"])),
    )


def make_periodic_chain(hyper: Hyper, *, redraws: bool) -> bf.Chain:
    """What happens once in a period, after the step.

    Args:
        hyper: hyperparameters by mechanism, as in `OFF`.
        redraws: whether synapses are re-drawn; Adam then counts the steps of each, which doubles its cost.

    Returns:
        The chain.
    """
    random_turnover = partial(bf.rejuvenate_weights, selection="random", **hyper["random_turnover"])
    redrawing = [
        partial(bf.rejuvenate_weights, **hyper["rejuvenate_weights"]),
        bf.named("random_turnover", random_turnover),
    ]
    return bf.chain(age, *(redrawing if redraws else []), partial(shrink_and_perturb, **hyper["shrink_and_perturb"]))


@bf.rule(phase="weights", memory={"periods": 0.0})
def age(params: Leaves, grads: Leaves, state: BioState, *, name: str) -> tuple[Leaves, Leaves, BioState]:
    """Counts the periods that each synapse has lived; a synapse of age 0 after a period was re-drawn in it."""
    periods = {path: leaf + 1 for path, leaf in state.slots[name]["periods"].items()}
    return params, grads, state.with_slot(name, periods=periods)


def make_model() -> nn.Module:
    """The network of the study: 64 - 50 - 50 - 10, ReLU."""
    return nn.Sequential(
        nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


def _is_hidden(path: str, leaf: Any) -> bool:
    return path in ("0.weight", "2.weight")


def _hyperparameters(arm: str, setting: Mapping[str, Any]) -> Hyper:
    mechanism = ARMS[arm]
    return {rule: {**off, **(setting if rule == mechanism else {})} for rule, off in OFF.items()}


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


def _run(study: Mapping[str, Any], task: str, optimizer: str, advance: Callable[[int], None]) -> Results:
    """Tunes the learning rate with the plain arm, then every arm, then compares the chosen settings."""
    trainer = Trainer(task, optimizer, study["tasks"][task])
    arms, tuning_seeds = study["arms"], study["tuning_seeds"]
    rates = study["optimizers"][optimizer]["lr"]
    found: dict[str, dict[str, dict[str, list[Any]]]] = {arm: {} for arm in arms}

    def tune(members: list[Member], name: Callable[[Member], str]) -> None:
        runs = trainer.train(members, advance)
        for member, metrics in zip(members, runs, strict=True):
            kept = found[member.arm].setdefault(name(member), {"tuning accuracy": []})
            kept["tuning accuracy"].append(metrics["mean online accuracy"])

    def best(arm: str) -> str:
        return max(found[arm], key=lambda setting: float(numpy.mean(found[arm][setting]["tuning accuracy"])))

    tune([Member("plain", {}, lr, seed) for lr in rates for seed in tuning_seeds], lambda member: f"lr={member.lr:g}")
    lr = {f"lr={rate:g}": rate for rate in rates}[best("plain")]
    tune(
        [
            Member(arm, setting, lr, seed)
            for arm in arms
            if arm != "plain"
            for setting in arms[arm]
            for seed in tuning_seeds
        ],
        lambda member: describe(member.setting),
    )
    chosen = {arm: {describe(setting): setting for setting in arms[arm]}.get(best(arm), {}) for arm in arms}
    members = [Member(arm, chosen[arm], lr, seed) for arm in arms for seed in range(study["seeds"])]
    for member, metrics in zip(members, trainer.train(members, advance), strict=True):
        kept = found[member.arm][best(member.arm)]
        for metric, value in metrics.items():
            kept.setdefault(metric, []).append(value)
    return {f"{task}, {optimizer}": found}


def describe(setting: Mapping[str, float]) -> str:
    """A setting as text: "rate=0.01"."""
    return " ".join([f"{name}={value:g}" for name, value in setting.items()])


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
        hyper = _stacked([_hyperparameters(member.arm, member.setting) for member in members])
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


def _steps(plan: Mapping[str, int]) -> int:
    return plan["tasks"] * plan["epochs"] * (plan["samples"] // BATCH)


def _chunks(study: Mapping[str, Any], optimizer: str) -> int:
    """How many chunks `_run` trains: for the learning rate, for the strengths, and for the comparison."""
    seeds, tuning_seeds = study["seeds"], len(study["tuning_seeds"])
    members = [len(study["optimizers"][optimizer]["lr"]) * tuning_seeds]
    for redraws in (False, True):
        arms = [arm for arm in study["arms"] if (arm in REDRAWING) == redraws]
        members.append(sum([len(study["arms"][arm]) for arm in arms if arm != "plain"]) * tuning_seeds)
        members.append(len(arms) * seeds)
    return sum([math.ceil(count / CHUNK) for count in members])
