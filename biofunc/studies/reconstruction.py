"""Attacks that rebuild a private image from a shared gradient, and how good the rebuilt image is.

Closed form. A layer W x + b with the error delta behind it has the gradients G = delta x^T and delta, so that any row
gives the input away: x = G_i / delta_i. A defence that scales entries leaves every row a noisy copy of x, and rows can
be averaged.

Cosine (Geiping, Bauermeister, Dröge, Moeller 2020, arXiv 2003.14053). The image whose gradient points where the shared
one does, smooth by its total variation, found by Adam on the sign of the gradient in the box [0, 1]:

    min over x of 1 - cos(gradient(x), shared) + smoothness TV(x)
"""

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["cosine_attack", "least_squares", "midrange", "one_row", "psnr", "rank_one", "ssim"]

PSNR_LIMIT = 150.0  # dB; an exact image has an infinite one
WINDOW = 7


def one_row(weight: Tensor, bias: Tensor) -> Tensor:
    """The input as the row with the largest bias gradient has it: `x = G_i / delta_i`.

    Args:
        weight: G, gradient of the first layer's weight, `(outputs, inputs)`.
        bias: delta, gradient of its bias, `(outputs,)`.

    Returns:
        `(inputs,)`; 0 if delta is 0 everywhere.
    """
    row = bias.abs().argmax().reshape(1)
    return _ratio(weight.index_select(0, row)[0], bias.index_select(0, row)[0])


def least_squares(weight: Tensor, bias: Tensor) -> Tensor:
    """The input that explains all rows best: `x_j = sum_i delta_i G_ij / sum_i delta_i^2`, over entries that are not 0.

    Args, Returns: as for `one_row`.
    """
    seen = (weight != 0).to(weight.dtype)
    return _ratio(bias @ weight, (bias * bias) @ seen)


def midrange(weight: Tensor, bias: Tensor, nu: float) -> Tensor:
    """The input if every entry of G was scaled by an unknown rate within 1 - nu and 1 + nu.

    The ratios `G_ij / delta_i` lie within `(1 - nu) x_j` and `(1 + nu) x_j`, so that the largest and the smallest of a
    column bound x_j; the middle of the bounds errs by about nu over the number of rows, an average by nu over its root.

    Args:
        weight, bias: as for `one_row`.
        nu: largest relative deviation of a rate from 1, in [0, 1).

    Returns:
        `(inputs,)`.
    """
    usable = (weight != 0) & (bias != 0).unsqueeze(1)
    ratio = _ratio(weight, bias.unsqueeze(1))
    largest = torch.where(usable, ratio, -torch.inf).amax(0)
    smallest = torch.where(usable, ratio, torch.inf).amin(0)
    middle = (largest / (1 + nu) + smallest / (1 - nu)) / 2
    return torch.where(usable.any(0), middle, 0.0)


def rank_one(weight: Tensor, bias: Tensor, iterations: int = 10) -> Tensor:
    """The input if rates act on the bias too: the best `u x^T` for G, with the size of u taken from delta.

    Args:
        weight, bias: as for `one_row`.
        iterations: alternations between u and x, which converge fast since G is close to such a product.

    Returns:
        `(inputs,)`.
    """
    x = bias @ weight
    for _ in range(iterations):
        u = weight @ _ratio(x, x.norm())
        x = _ratio(u @ weight, u @ u)
    return x * _ratio(u @ bias, bias @ bias)


def cosine_attack(
    gradient: Callable[[Tensor, Tensor], Tensor],
    shared: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    iterations: int,
    smoothness: float,
    spread: Tensor | float = 0.0,
    seen: Tensor | float = 1.0,
    lr: float = 0.1,
    advance: Callable[[int], None] = lambda steps: None,
) -> Tensor:
    """Rebuilds images from the gradients they caused. Members (victims) lie on the first axis, and share nothing.

    The rates of a member's synapses, if they are unknown, are the same for all its images and are looked for together
    with them, as `1 + spread r` with r in [-1, 1].

    Args:
        gradient: `(images, labels) -> gradients` of all members, `(members, images, parameters)`.
        shared: what the attacker has got, `(members, images, parameters)`.
        labels: known to the attacker, `(members, images)`.
        start: first guess, `(members, images, height, width)` in [0, 1].
        iterations: steps of Adam.
        smoothness: weight of the total variation, >= 0.
        spread: largest relative deviation of each synapse's unknown rate from 1, in [0, 1), `(parameters,)`; 0: none.
        seen: 1 where an entry of shared is compared, 0 where it is left out; broadcasts with shared.
        lr: first learning rate; a tenth of it from 3/8 of the iterations on, again from 5/8 and from 7/8.
        advance: called with 1 after each iteration.

    Returns:
        The images, like start.
    """
    search_rates = isinstance(spread, Tensor)
    unknown = [start]
    if search_rates:
        unknown.append(shared.new_zeros(shared.shape[0], 1, shared.shape[2]))
    bounds = [(0.0, 1.0), (-1.0, 1.0)]
    moments = [(torch.zeros_like(v), torch.zeros_like(v)) for v in unknown]
    for step in range(1, iterations + 1):
        unknown = [v.detach().requires_grad_() for v in unknown]
        candidate = gradient(unknown[0], labels) * seen
        if search_rates:
            candidate = candidate * (1 + spread * unknown[1])
        cosine = torch.nn.functional.cosine_similarity(candidate, shared * seen, dim=-1, eps=1e-20)
        cost = (1 - cosine).sum() + smoothness * _total_variation(unknown[0])
        rate = lr * 0.1 ** sum(step > share * iterations for share in (3 / 8, 5 / 8, 7 / 8))
        for i, slope in enumerate(torch.autograd.grad(cost, unknown)):
            m, v = moments[i]
            m = 0.9 * m + 0.1 * slope.sign()
            v = 0.999 * v + 0.001 * slope.sign().square()
            moments[i] = m, v
            moved = rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            unknown[i] = (unknown[i].detach() - moved).clamp(*bounds[i])
        advance(1)
    return unknown[0]


def psnr(image: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, `10 log10(1 / mean squared error)` of images in [0, 1].

    Args:
        image: `(..., height, width)`, clipped to [0, 1].
        truth: likewise.

    Returns:
        `(...,)` in dB, 150 at most.
    """
    error = (image.clamp(0, 1) - truth).to(torch.float64).square().mean((-2, -1))
    return (-10 * torch.log10(error)).clamp(max=PSNR_LIMIT)


def ssim(image: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of images in [0, 1], the mean over all 7 x 7 windows.

        ((2 m_x m_y + c_1) (2 s_xy + c_2)) / ((m_x^2 + m_y^2 + c_1) (s_x^2 + s_y^2 + c_2)),    c = 0.01^2, 0.03^2

    m are the means of a window, s its sample variances and covariance.

    Args:
        image: `(..., height, width)`, clipped to [0, 1], both at least 7.
        truth: likewise.

    Returns:
        `(...,)`, 1 for equal images.

    Source: Wang, Bovik, Sheikh, Simoncelli 2004, doi 10.1109/TIP.2003.819861, with a uniform window.
    """
    x, y = [
        i.to(torch.float64).clamp(0, 1).unfold(-2, WINDOW, 1).unfold(-2, WINDOW, 1).flatten(-2) for i in (image, truth)
    ]
    mean_x, mean_y = x.mean(-1), y.mean(-1)
    covariance = ((x - mean_x.unsqueeze(-1)) * (y - mean_y.unsqueeze(-1))).sum(-1) / (WINDOW**2 - 1)
    c_1, c_2 = 0.01**2, 0.03**2
    similarity = ((2 * mean_x * mean_y + c_1) * (2 * covariance + c_2)) / (
        (mean_x.square() + mean_y.square() + c_1) * (x.var(-1) + y.var(-1) + c_2)
    )
    return similarity.mean((-2, -1))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0.0, numerator / torch.where(denominator == 0, 1.0, denominator))


def _total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, summed over images."""
    vertical, horizontal = images.diff(dim=-2).abs().mean((-2, -1)), images.diff(dim=-1).abs().mean((-2, -1))
    total: Tensor = (vertical + horizontal).sum()
    return total
