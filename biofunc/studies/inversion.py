"""Gradient inversion: does what a mechanism does to a shared gradient keep the image behind it private?

A victim trains a network with a defence at work and then shares the gradients of single private images. A server that
knows architecture, weights, labels and the defence rebuilds them, by closed form from a perceptron and by the cosine
attack from a small network of convolutions. The attackers:

    unaware       takes a shared gradient at face value
    adaptive      knows the rule: averages the rounds, divides out what the weights give away (volume) and what a server
                  that saw every round can replay (crystallisation), looks for constant unknown rates together with all
                  images of the victim, and leaves out entries that are 0
    knows rates   is told the rates that the victim was born with, which bounds all attacks on them

Each attacker may also do what the one before it does, and the best image, by the truth, counts: in doubt the defence is
called weaker than it is. A mechanism is compared with gradient noise and pruning of equal cost in accuracy.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import biofunc as bf
from biofunc import datasets
from biofunc.compare import compiler_works
from biofunc.studies import Job, Results
from biofunc.studies.gradient_noise import gradient_noise
from biofunc.studies.gradient_pruning import gradient_pruning
from biofunc.studies.reconstruction import cosine_attack, least_squares, midrange, one_row, psnr, rank_one, ssim
from biofunc.trees import Leaves

CLASSES = 10
TEST_SHARE = 0.2
ATTACKERS = ("unaware", "adaptive", "knows rates")
SETTINGS = {
    "nu": "[0, 1)",
    "dampening_factor": "(0, 1]",
    "stability_factor": "[0, inf)",
    "lr_variability": "[0, inf)",
    "gamma": "an integer >= 1",
}
LARGEST_UNDOING = 1e6  # a rate below its inverse is not divided out: rounding is all that is left

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
class Observed:
    """What attackers have in hand: gradients by path, `(seeds, images, ...)`."""

    unaware: Leaves  # of the first round
    adaptive: Leaves  # mean over rounds, known factors divided out
    exact: Leaves  # the same, innate rates divided out too


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

    Under `vmap` with weights of its own for each member, a convolution is a grouped one, whose second derivatives took
    9 ms per member on a CPU where this takes 0.2.
    """

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride, padding = self.kernel_size[0], self.stride[0], int(self.padding[0])
        height, width = [(n + 2 * padding - kernel) // stride + 1 for n in x.shape[-2:]]
        columns = nn.functional.unfold(x, kernel, padding=padding, stride=stride)
        bias = 0.0 if self.bias is None else self.bias.unsqueeze(-1)
        product = self.weight.flatten(1) @ columns + bias
        return product.reshape(*product.shape[:-1], height, width)


def check(study: dict[str, Any]) -> None:
    """Raises a ValueError of one line for whatever in the study cannot be run."""
    for name in ("seeds", "steps", "iterations", "images", "rounds"):
        _check_number(name, study[name], minimum=1, whole=True)
    _check_number("smoothness", study["smoothness"], minimum=0)
    if study["arms"].get("none") != {}:
        raise ValueError("arms lacks none = {}, the gradient as it is, with which all are compared")
    for arm, settings in study["arms"].items():
        for name, value in settings.items():
            if name not in SETTINGS:
                raise ValueError(f"arm '{arm}' sets '{name}'; an arm sets {', '.join(SETTINGS)}")
            _check_number(f"{name} of arm '{arm}'", value, minimum=1 if name == "gamma" else 0, whole=name == "gamma")
            if (name == "nu" and value >= 1) or (name == "dampening_factor" and not 0 < value <= 1):
                raise ValueError(f"{name} of arm '{arm}' is {value}; it must lie in {SETTINGS[name]}")
    _check_number("matching.loss", study["matching"]["loss"], minimum=0)
    for kind, highest in (("noise", math.inf), ("pruning", 1.0)):
        strengths = study["matching"][kind]
        if not strengths or strengths != sorted(set(strengths)) or not 0 < strengths[0] <= strengths[-1] < highest:
            raise ValueError(f"matching.{kind} is {strengths}; give rising strengths in (0, {highest})")
    if not study["tasks"]:
        raise ValueError("tasks is empty; give at least one [[tasks]]")
    for settings in study["tasks"]:
        task = Task(**settings)
        if task.attack not in get_args(Attack):
            raise ValueError(f"a task has attack '{task.attack}'; it must be one of {', '.join(get_args(Attack))}")
        if task.data not in ("digits", "mnist5k"):
            raise ValueError(f"a task has data '{task.data}'; images are digits and mnist5k")
        if task.defended not in get_args(Defended):
            raise ValueError(f"a task has defended '{task.defended}'; give {' or '.join(get_args(Defended))}")
        sizes = (8,) if task.data == "digits" else (28, 14)
        if task.size not in sizes:
            raise ValueError(f"a task on {task.data} has size {task.size}; give {' or '.join(map(str, sizes))}")
        network = study["networks"][task.attack]
        _check_number(f"hidden of '{task.attack}'", network["hidden"], minimum=1, whole=True)
        _check_number(f"batch of '{task.attack}'", network["batch"], minimum=1, whole=True)
        _check_number(f"lr of '{task.attack}'", network["lr"], minimum=0)
        for arm, settings in study["arms"].items():
            if network["hidden"] % settings.get("gamma", 1):
                raise ValueError(f"gamma of arm '{arm}' does not divide hidden {network['hidden']} of '{task.attack}'")
    known = {*study["arms"], *[f"{kind} for {arm}" for kind in ("noise", "pruning") for arm in _mechanisms(study)]}
    for arm, other in study.get("controls", {}).items():
        for name in (arm, other):
            if name not in known:
                raise ValueError(f"controls names '{name}', which is no arm; the arms are {'; '.join(sorted(known))}")


def jobs(study: dict[str, Any]) -> list[Job]:
    """One job per task: training with every defence, choice of matched strengths, attacks."""
    tasks = [Task(**settings) for settings in study["tasks"]]
    return [Job(task.name, _steps(study, task), partial(_run, study, task)) for task in tasks]


def strongest(strengths: Sequence[float], losses: Sequence[float], allowed: float) -> float:
    """The largest strength that loses no more accuracy than allowed; the smallest of all if each loses more.

    Args:
        strengths: those tried.
        losses: mean loss of accuracy of each, against no defence.
        allowed: the loss of the mechanism that the strength is to match.
    """
    affordable = [strength for strength, loss in zip(strengths, losses, strict=True) if loss <= allowed]
    return max(affordable) if affordable else min(strengths)


def _check_number(name: str, value: Any, *, minimum: float, whole: bool = False) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not minimum <= value < math.inf:
        raise ValueError(f"{name} is {value!r}; give {'an integer' if whole else 'a number'} of at least {minimum}")


def _mechanisms(study: dict[str, Any]) -> list[str]:
    return [arm for arm in study["arms"] if arm != "none"]


def _trainings(study: dict[str, Any]) -> int:
    return len(study["arms"]) + len(study["matching"]["noise"]) + len(study["matching"]["pruning"])


def _steps(study: dict[str, Any], task: Task) -> int:
    """At most: strengths that two mechanisms share are attacked once."""
    attacks: int = 3 * study["iterations"] * (len(study["arms"]) + 2 * len(_mechanisms(study)))
    training: int = _trainings(study) * study["steps"]
    return training + (attacks if task.attack == "cosine" else 0)


def _run(study: dict[str, Any], task: Task, advance: Advance) -> Results:
    if compiler_works("cpu"):
        bf.random.accelerate()
    done = 0

    def count(steps: int) -> None:
        nonlocal done
        done += steps
        advance(steps)

    data = load(study, task)
    train = partial(train_victims, study, task, data, count)
    victims = {defence: train(defence) for defence in _candidates(study)}
    chosen = match(study, {defence: v.accuracy.mean().item() for defence, v in victims.items()})
    measured = {d: _measure(study, task, data, d, victims[d], count) for d in dict.fromkeys(chosen.values())}
    advance(_steps(study, task) - done)
    results: Results = {f"{task.name}, {attacker}": {} for attacker in ATTACKERS}
    for arm, defence in chosen.items():
        strength = defence.noise or defence.pruning
        for attacker in ATTACKERS:
            setting = f"strength={strength}" if strength else ""
            results[f"{task.name}, {attacker}"][arm] = {setting: measured[defence][attacker]}
    return results


def _candidates(study: dict[str, Any]) -> list[Defence]:
    return [
        *[Defence(**settings) for settings in study["arms"].values()],
        *[_alone(kind, strength) for kind in ("noise", "pruning") for strength in study["matching"][kind]],
    ]


def match(study: dict[str, Any], accuracy: dict[Defence, float]) -> dict[str, Defence]:
    """Chooses the strengths of noise and pruning that cost as much accuracy as each mechanism.

    Args:
        study: its arms and `matching`.
        accuracy: mean test accuracy with each defence.

    Returns:
        The defence of each arm, those of `noise for ARM` and `pruning for ARM` included.
    """
    chosen = {arm: Defence(**settings) for arm, settings in study["arms"].items()}
    plain = accuracy[Defence()]
    for arm in _mechanisms(study):
        allowed = max(plain - accuracy[chosen[arm]], study["matching"]["loss"])
        for kind in ("noise", "pruning"):
            strengths = study["matching"][kind]
            losses = [plain - accuracy[_alone(kind, strength)] for strength in strengths]
            chosen[f"{kind} for {arm}"] = _alone(kind, strongest(strengths, losses, allowed))
    return chosen


def _alone(kind: str, strength: float) -> Defence:
    return Defence(noise=strength) if kind == "noise" else Defence(pruning=strength)


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
    gradient = grad(partial(_loss, model))

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


def _loss(model: nn.Module, params: Leaves, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(functional_call(model, params, (x,)), y)


def observe(study: dict[str, Any], data: Data, defence: Defence, victims: Victims) -> Observed:
    """Lets victims share the gradient of each private image in each round, and does what attackers can do at once."""
    share = bf.chain(*defence.rules())
    gradient = grad(partial(_loss, victims.model))

    @torch.vmap
    def visit(
        params: Leaves, innate: Leaves, state: bf.BioState, x: Tensor, y: Tensor
    ) -> tuple[Leaves, Leaves, Leaves, bf.BioState]:
        _, shared, state = share(params, gradient(params, x.unsqueeze(0), y.unsqueeze(0)), state)
        known = {path: _known_factor(params[path], state.plasticity[path] / innate[path], defence) for path in innate}
        undone = {path: _undo(g, known[path]) if path in known else g for path, g in shared.items()}
        exact = {path: _undo(g, innate[path]) if path in innate else g for path, g in undone.items()}
        return shared, undone, exact, state

    state = victims.state
    rounds: list[Observed] = []
    for _ in range(study["rounds"]):
        seen = []
        for i in range(study["images"]):
            index = data.private[:, i]
            *shared, state = visit(victims.params, victims.innate, state, data.images[index], data.labels[index])
            seen.append(shared)
        rounds.append(Observed(*[_over_images(list(kind)) for kind in zip(*seen, strict=True)]))
    return Observed(
        rounds[0].unaware, _mean_over_rounds([r.adaptive for r in rounds]), _mean_over_rounds([r.exact for r in rounds])
    )


def _known_factor(w: Tensor, crystallised: Tensor, defence: Defence) -> Tensor:
    """What the server can compute: the mean factor of the volume, and rates lowered by crystallisation."""
    volume = w.abs() / (w.abs() + 1)
    eta = torch.exp(-defence.stability_factor * volume)
    return crystallised * eta / eta.mean()


def _undo(g: Tensor, factor: Tensor) -> Tensor:
    return torch.where(factor > 1 / LARGEST_UNDOING, g / factor.clamp(min=1 / LARGEST_UNDOING), 0.0)


def _over_images(trees: list[Leaves]) -> Leaves:
    return {path: torch.stack([tree[path] for tree in trees], 1) for path in trees[0]}


def _mean_over_rounds(trees: list[Leaves]) -> Leaves:
    return {path: torch.stack([tree[path] for tree in trees]).mean(0) for path in trees[0]}


def _measure(
    study: dict[str, Any], task: Task, data: Data, defence: Defence, victims: Victims, advance: Advance
) -> dict[str, dict[str, list[float]]]:
    """Metrics per attacker, one value per seed."""
    observed = observe(study, data, defence, victims)
    if task.attack == "closed form":
        found = closed_form_images(task, defence, observed)
    else:
        found = cosine_images(study, data, defence, victims, observed, advance)
    truth = data.truth()
    guess = psnr(data.mean_image(), truth)
    measured: dict[str, dict[str, list[float]]] = {}
    images: dict[str, Tensor] = {}
    for attacker in ATTACKERS:
        images |= found[attacker]
        quality = torch.stack([psnr(image, truth) for image in images.values()])
        best = quality.argmax(0)
        similarity = torch.stack([ssim(image, truth) for image in images.values()])
        highest = quality.amax(0)
        measured[attacker] = {
            "PSNR of the best attacker": highest.tolist(),
            "SSIM of the best attacker": similarity.gather(0, best.unsqueeze(0))[0].tolist(),
            "better than the mean image": (highest > guess).double().tolist(),
            "PSNR of the mean image": guess.tolist(),
            "test accuracy": victims.accuracy.double().tolist(),
            **{f"PSNR, {name}": psnr(image, truth).tolist() for name, image in found[attacker].items()},
        }
    return measured


def closed_form_images(task: Task, defence: Defence, observed: Observed) -> dict[str, dict[str, Tensor]]:
    """Images `(seeds, height, width)` by attacker and estimator, from the gradients of the first layer."""

    def estimate(estimator: Callable[[Tensor, Tensor], Tensor], gradients: Leaves) -> Tensor:
        inputs = torch.vmap(estimator)(gradients["1.weight"][:, 0], gradients["1.bias"][:, 0])
        return inputs.reshape(-1, task.size, task.size)

    return {
        "unaware": {
            "one row": estimate(one_row, observed.unaware),
            "least squares": estimate(least_squares, observed.unaware),
        },
        "adaptive": {
            "least squares, rule undone": estimate(least_squares, observed.adaptive),
            "middle of the bounds": estimate(partial(midrange, nu=defence.nu), observed.adaptive),
            "rank one": estimate(rank_one, observed.adaptive),
        },
        "knows rates": {
            "one row, rates undone": estimate(one_row, observed.exact),
            "least squares, rates undone": estimate(least_squares, observed.exact),
        },
    }


def cosine_images(
    study: dict[str, Any], data: Data, defence: Defence, victims: Victims, observed: Observed, advance: Advance
) -> dict[str, dict[str, Tensor]]:
    """Images `(seeds, height, width)` by attacker, from the gradients of all layers.

    An attacker whose gradients are those of the one before it would find the same image, and does not search again.
    """
    model, params = victims.model, victims.params
    single = grad(partial(_loss, model))

    def flat(gradients: Leaves, batch_dims: int = 2) -> Tensor:
        return torch.cat([g.flatten(batch_dims) for g in gradients.values()], -1)

    def gradient(images: Tensor, labels: Tensor) -> Tensor:
        one = torch.vmap(lambda p, x, y: single(p, x.unsqueeze(0), y.unsqueeze(0)), in_dims=(None, 0, 0))
        return flat(torch.vmap(one)(params, images, labels))

    size = data.images.shape[-2:]
    start = bf.random.uniform(bf.random.fold_in(data.keys, "start"), (data.private.shape[1], *size))

    def attack(gradients: Leaves, images: int, **options: Any) -> Tensor:
        found = cosine_attack(
            gradient,
            flat(gradients)[:, :images],
            data.labels[data.private[:, :images]],
            start[:, :images],
            iterations=study["iterations"],
            smoothness=study["smoothness"],
            advance=advance,
            **options,
        )
        return found[:, 0]

    found = {"unaware": {"cosine": attack(observed.unaware, 1)}}
    undone, seen = flat(observed.adaptive), (flat(observed.adaptive) != 0).float()
    if defence.nu > 0:
        spread = torch.cat(
            [torch.full((p[0].numel(),), defence.nu if path in victims.innate else 0.0) for path, p in params.items()]
        )
        found["adaptive"] = {
            "cosine, rates and images": attack(observed.adaptive, study["images"], spread=spread, seen=seen)
        }
    elif torch.allclose(undone[:, 0], flat(observed.unaware)[:, 0], rtol=1e-5, atol=0) and bool(seen[:, 0].all()):
        found["adaptive"] = {}
    else:
        found["adaptive"] = {"cosine, rule undone": attack(observed.adaptive, 1, seen=seen[:, :1])}
    if defence.nu > 0:
        seen = (flat(observed.exact) != 0).float()
        found["knows rates"] = {"cosine, rates undone": attack(observed.exact, 1, seen=seen[:, :1])}
    else:
        found["knows rates"] = {}
    return found
