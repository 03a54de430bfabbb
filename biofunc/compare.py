"""The main job: bio-modified networks against plain ones, on real data, as one vmapped ensemble.

Every arm is the same chain with other hyperparameters: a mechanism that an arm does not have is at its off setting. So
all arms and all seeds are one member axis, and one compilation serves them; weight splitting changes the forward pass
and has its own. Arms are paired: a seed fixes the initial weights, the split into training and test data, the order of
the batches and the noise, and is used by every arm. Seeds are trained chunk by chunk, so that ranks can share them and
give the numbers of one process.
"""

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import biofunc as bf
from biofunc.datasets import Dataset

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

HIDDEN = 128
CLASSES = 10
BATCH = 64
TEST_SHARE = 0.2
REJUVENATION_PERIOD = 80
EVALUATIONS = 30
CHUNK = 8
"""Seeds that are trained together, each in all arms; the last chunk is filled up."""

LEARNING_RATES = {"sgd": 0.1, "adam": 1e-3}

OFF = {
    "dampening_factor": 1.0,
    "stability_factor": 0.0,
    "lr_variability": 0.0,
    "nu": 0.0,
    "dre": math.inf,
}
MECHANISMS: dict[str, dict[str, float]] = {
    "fuzzy_learning_rates": {"nu": 0.16},
    "volume_dependent_lr": {"stability_factor": 2.0, "lr_variability": 0.2},
    "crystallize": {"dampening_factor": 0.6},
    "rejuvenate_weights": {"dre": 8.0},
    "weight_splitting": {},
}
ARMS: dict[str, tuple[str, ...]] = {
    "plain": (),
    **{name: (name,) for name in MECHANISMS},
    "all_five": tuple(MECHANISMS),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared, and how."""

    data: str = "digits"
    arms: tuple[str, ...] = tuple(ARMS)
    seeds: int = 32
    steps: int = 300
    optimizer: str = "sgd"
    lr: float = 0.1
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """Test accuracy `(evaluations, seeds)` of an arm, final rates `(seeds, synapses)`, its share of the wall time."""

    accuracy: Tensor
    rates: Tensor
    seconds: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Results of all arms, the steps at which accuracy was measured, and how the steps were executed."""

    config: Config
    evaluated: list[int]
    arms: dict[str, ArmResult]
    execution: str


Advance = Callable[[str, int], None]


def compare(
    config: Config,
    data: Dataset,
    advance: Advance = lambda doing, steps: None,
    mesh: "DeviceMesh | None" = None,
) -> Comparison:
    """Trains every arm with every seed.

    Args:
        config: what to compare.
        data: from `biofunc.datasets.load`.
        advance: called with what is being done and the ensemble steps just finished, for a progress bar.
        mesh: ranks that share the seeds; default: this process trains them all. The numbers are the same.

    Returns:
        The results, on every rank.
    """
    evaluated = sorted({round(config.steps * i / EVALUATIONS) for i in range(EVALUATIONS + 1)})
    chunks = chunks_of(config, mesh)
    results: dict[str, ArmResult] = {}
    compiled = compiler_works(config.device)
    if mesh is not None:  # compiled and plain steps round differently: all ranks take the same
        everywhere = torch.tensor(compiled, dtype=torch.int64, device=mesh.device_type)
        torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN, group=mesh.get_group())
        compiled = bool(everywhere)
    for split in (False, True):
        arms = [arm for arm in config.arms if ("weight_splitting" in ARMS[arm]) == split]
        if arms:
            start = time.perf_counter()
            train = _trainer(config, data, arms, split, compiled, evaluated, advance)
            trained = [train(chunk) for chunk in chunks]
            if mesh is None:
                accuracy, rates = bf.ensemble.join(trained, config.seeds)
            else:
                accuracy, rates = bf.ensemble.gather(trained, config.seeds, mesh)
            seconds = (time.perf_counter() - start) / len(arms)
            for i, arm in enumerate(arms):
                results[arm] = ArmResult(accuracy[:, i].T.cpu(), rates[:, i].cpu(), seconds)
    execution = "compile(vmap(step))" if compiled else "plain vmap(step): no working compiler was found"
    return Comparison(config, evaluated, {arm: results[arm] for arm in config.arms}, execution)


def chunks_of(config: Config, mesh: "DeviceMesh | None" = None) -> list[Tensor]:
    """The seeds that this process trains, in chunks of one size whatever the number of ranks."""
    seeds, size = torch.arange(config.seeds), min(CHUNK, config.seeds)
    return bf.ensemble.split(seeds, size) if mesh is None else bf.ensemble.shard(seeds, size, mesh)


def compiler_works(device: str) -> bool:
    """Whether `torch.compile` can build a kernel here: it needs g++ or clang++ and Python's headers, or Triton."""
    if device == "cpu" and not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return False
    try:
        torch.compile(lambda x: x * x + 1, fullgraph=True)(torch.zeros(8, device=device))
    except Exception:  # whatever stands in the way of a trivial kernel stands in the way of the real one
        return False
    return True


def make_model(features: int) -> nn.Module:
    """The network of the comparison: features - 128 - 10, ReLU.

    Args:
        features: number of inputs.

    Returns:
        A module with PyTorch's initial weights.
    """
    return nn.Sequential(nn.Linear(features, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def make_chain(optimizer: str, lr: float, nu: float | Tensor = 0.16) -> bf.Chain:
    """The chain of every arm; an arm's hyperparameters are handed to it at each step.

    Args:
        optimizer: "sgd" or "adam".
        lr: learning rate.
        nu: spread of the innate rates, which acts at init.

    Returns:
        The chain.
    """
    return bf.chain(
        bf.crystallize,
        *([bf.adam()] if optimizer == "adam" else []),
        partial(bf.volume_dependent_lr, base_lr=1.0, normalise=True),
        partial(bf.fuzzy_learning_rates, nu=nu),
        bf.descend(lr),
        bf.every(REJUVENATION_PERIOD, bf.rejuvenate_weights),
    )


def _trainer(
    config: Config,
    data: Dataset,
    arms: Sequence[str],
    split: bool,
    compiled: bool,
    evaluated: Sequence[int],
    advance: Advance,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function that trains arms which share a forward pass, with the seeds that it is given.

    It returns test accuracy `(seeds, arms, evaluations)` and final rates `(seeds, arms, synapses)`. Its step is
    compiled at the first chunk and serves all others.
    """
    inputs, labels = data.inputs.to(config.device), data.labels.to(config.device)
    features = inputs.shape[1]
    with torch.device("meta"):  # the forward pass alone; members bring the parameters
        model = make_model(features)
    if split:
        model = bf.split_synapses(model)
    learn = make_chain(config.optimizer, config.lr)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)

    def step(params: Any, state: bf.BioState, hyper: Any, x: Tensor, y: Tensor) -> tuple[Any, bf.BioState]:
        grads = grad(loss)(params, x, y)
        params, _, state = learn(params, grads, state, **hyper)
        return params, state

    ensemble_step = torch.vmap(step)
    if compiled:
        ensemble_step = torch.compile(ensemble_step, fullgraph=True)
    group = "split networks" if split else "plain networks"
    advance(f"{group}: compiling" if compiled else group, 0)

    def train(seeds: Tensor) -> tuple[Tensor, Tensor]:
        """Members lie arm by arm, seed by seed."""
        params, _ = bf.ensemble.init(lambda: make_model(features), seeds.tolist())
        params = {name: _per_arm(p.to(config.device), len(arms)) for name, p in params.items()}
        keys = bf.random.key(seeds, device=config.device)
        hyper = _hyperparameters(arms, len(seeds), config.device)
        nu = hyper.pop("nu")
        state = torch.vmap(lambda p, k, nu: make_chain(config.optimizer, config.lr, nu).init(p, k))(
            params, _per_arm(keys, len(arms)), nu
        )
        train, test = _splits(keys, len(labels))
        x_test, y_test = inputs[test], labels[test]
        accuracy = []
        for number, batch in enumerate(_batches(keys, train, config.steps)):
            if number in evaluated:
                accuracy.append(_accuracy(model, params, x_test, y_test, len(arms)))
            members = _per_arm(batch, len(arms))
            params, state = ensemble_step(params, state, hyper, inputs[members], labels[members])
            advance(group, 1)
        accuracy.append(_accuracy(model, params, x_test, y_test, len(arms)))
        rates = torch.cat([rate.reshape(len(arms), len(seeds), -1) for rate in state.plasticity.values()], -1)
        return torch.stack(accuracy).permute(2, 1, 0), rates.transpose(0, 1)

    return train


def _hyperparameters(arms: Sequence[str], seeds: int, device: str) -> dict[str, Tensor]:
    """One value per member, arm by arm."""
    settings = [{**OFF, **{k: v for name in ARMS[arm] for k, v in MECHANISMS[name].items()}} for arm in arms]
    return {
        name: torch.tensor([setting[name] for setting in settings], device=device).repeat_interleave(seeds)
        for name in OFF
    }


def _per_arm(per_seed: Tensor, arms: int) -> Tensor:
    return per_seed.repeat(arms, *[1] * (per_seed.dim() - 1))


def _splits(keys: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Indices of each seed's training and test samples."""
    order = bf.random.uniform(bf.random.fold_in(keys, "split"), (samples,)).argsort(-1)
    held_out = int(samples * TEST_SHARE)
    return order[:, held_out:], order[:, :held_out]


def _batches(keys: Tensor, train: Tensor, steps: int) -> Iterable[Tensor]:
    """Indices of each seed's batches, `(seeds, batch)`, in an order that is new in every epoch."""
    keys = bf.random.fold_in(keys, "order")
    per_epoch = max(1, train.shape[1] // BATCH)
    for number in range(steps):
        position = number % per_epoch
        if position == 0:
            draws = bf.random.uniform(bf.random.fold_in(keys, number // per_epoch), (train.shape[1],))
            shuffled = train.gather(1, draws.argsort(-1))
        yield shuffled[:, position * BATCH : (position + 1) * BATCH]


def _accuracy(model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor, arms: int) -> Tensor:
    """Test accuracy `(arms, seeds)`."""
    seeds = x.shape[0]
    predict = torch.vmap(lambda params, x: functional_call(model, params, (x,)).argmax(-1))
    per_arm = []
    for arm in range(arms):
        members = {name: p[arm * seeds : (arm + 1) * seeds] for name, p in params.items()}
        per_arm.append((predict(members, x) == y).float().mean(-1))
    return torch.stack(per_arm)
