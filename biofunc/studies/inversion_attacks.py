"""Attacks of gradient inversion: what attackers see of the victims' gradients, and the images that they rebuild."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

import biofunc as bf
from biofunc.studies.inversion_victims import Advance, Data, Defence, Task, Victims, loss
from biofunc.studies.reconstruction import cosine_attack, least_squares, midrange, one_row, rank_one
from biofunc.trees import Leaves

LARGEST_UNDOING = 1e30  # by smaller rates than its inverse, gradients leave the range of float32


@dataclasses.dataclass(frozen=True)
class Observed:
    """What attackers have in hand: gradients by path, `(seeds, images, ...)`."""

    unaware: Leaves  # of the first round
    adaptive: Leaves  # mean over rounds, known factors divided out
    exact: Leaves  # the same, innate rates divided out too


def observe(study: dict[str, Any], data: Data, defence: Defence, victims: Victims) -> Observed:
    """Lets victims share the gradient of each private image in each round, and does what attackers can do at once."""
    share = bf.chain(*defence.rules())
    gradient = grad(partial(loss, victims.model))

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
            "one row, rule undone": estimate(one_row, observed.adaptive),
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
    single = grad(partial(loss, model))

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
