"""Mechanisms as scalar loops, written from the formulas, in Python floats.

Each oracle takes one leaf as flat lists `w`, `g` and what the rule remembers of it, and gives (new w, new g, memory).
`memory` holds "rate" and "innate" (or None) and the entries of the rule's slot. Draws are handed in: the laws make them
leaf by leaf from the key that the contract names.
"""

import math


def _finite(values):
    return [value for value in values if math.isfinite(value)]


def _mean(values):
    finite = _finite(values)
    return sum(finite) / len(finite) if finite else 0.0


def _largest(values):
    return max(_finite(values), default=0.0)


def crystallize(
    w, g, memory, draws, crystal_thresh=4.5e-5, dampening_factor=0.6, floor=0.0, recovery=0.0, freeze_silent=False
):
    mean = _mean([abs(x) for x in w])
    rates = []
    for i in range(len(w)):
        rate = memory["rate"][i]
        innate = 1.0 if memory["innate"] is None else memory["innate"][i]
        settled = abs(g[i]) < crystal_thresh * abs(w[i]) or abs(g[i]) > mean
        if g[i] == 0 and not freeze_silent:
            settled = False
        if settled:
            rates.append(min(rate, max(rate * dampening_factor, floor)))
        else:
            rates.append(rate + recovery * (innate - rate))
    return w, g, {**memory, "rate": rates}


def fuzzy_learning_rates(w, g, memory, draws, **at_init):
    return w, [g[i] * memory["rate"][i] for i in range(len(g))], memory


def fuzzy_rates(uniforms, nu=0.16, rate_min=0.5, rate_max=2.0):
    return [min(max(1 + nu * (2 * u - 1), rate_min), rate_max) for u in uniforms]


def volume_dependent_lr(w, g, memory, draws, base_lr=0.1, stability_factor=2.0, lr_variability=0.2, normalise=False):
    z = draws(len(w), "normal")[0]
    factors = []
    for i in range(len(w)):
        volume = abs(w[i]) / (abs(w[i]) + 1)
        eta = base_lr * math.exp(-stability_factor * volume)
        factors.append(abs(eta + lr_variability * eta * z[i]))
    if normalise:
        mean = _mean(factors)
        factors = [factor / mean for factor in factors]
    return w, [g[i] * factors[i] for i in range(len(g))], memory


def rejuvenate_weights(w, g, memory, draws, dre=8.0, rate=None, selection="small"):
    first, new, coin = draws(len(w), "normal" if selection == "small" else "uniform", "uniform", "coin")
    largest = _largest([abs(x) for x in w])
    if rate is not None:
        number = math.floor(len(w) * rate + coin[0])
        frailty = [abs(w[i]) / abs(first[i]) if selection == "small" else first[i] for i in range(len(w))]
        order = sorted(range(len(w)), key=lambda i: frailty[i])
        dies = [i in order[:number] for i in range(len(w))]
    elif selection == "small":
        dies = [abs(first[i]) * largest / dre > abs(w[i]) for i in range(len(w))]
    else:
        share = _mean([math.erfc(abs(x) * dre / (largest * math.sqrt(2))) for x in w]) if largest else 0.0
        dies = [first[i] < share for i in range(len(w))]
    weights = [largest * (2 * new[i] - 1) if dies[i] else w[i] for i in range(len(w))]
    innate = [1.0] * len(w) if memory["innate"] is None else memory["innate"]
    rates = memory["rate"]
    if not memory["rate_is_shared"]:
        rates = [innate[i] if dies[i] else rates[i] for i in range(len(w))]
    return weights, g, {**memory, "rate": rates}


def rejuvenate_weights_lognormal(w, g, memory, draws, dre=8.0, spread=1.0):
    death, z = draws(len(w), "uniform", "normal")
    size = [abs(x) for x in w]
    mean, center = _mean(size), _mean(w)
    deviation = math.sqrt(_mean([(x - center) ** 2 for x in w]))
    weights, rates = list(w), list(memory["rate"])
    innate = [1.0] * len(w) if memory["innate"] is None else memory["innate"]
    if deviation > 0:
        sigma = spread * math.sqrt(math.log1p(_mean([(x - mean) ** 2 for x in size]) / mean**2))
        for i in range(len(w)):
            if death[i] < math.exp(-dre * size[i] / deviation):
                sign = math.copysign(1, w[i]) if w[i] else (-1 if z[i] < 0 else 1)
                weights[i] = sign * mean * math.exp(sigma * z[i] - sigma**2 / 2)
                rates[i] = rates[i] if memory["rate_is_shared"] else innate[i]
    return weights, g, {**memory, "rate": rates}


def temporal_learning_rates(
    w, g, memory, draws, nu=0.16, decay=0.9995, renewal=0.1, renewal_period=10.0, rate_min=0.5, rate_max=2.0
):
    (u,) = draws(len(w), "uniform")
    t = memory["calls"][0] + 1
    rates = []
    for i in range(len(w)):
        rate = 1 + (memory["innate"][i] - 1) * decay
        if t % renewal_period == 0:
            rate += renewal * nu * (2 * u[i] - 1)
        rates.append(memory["rate"][i] * min(max(rate, rate_min), rate_max) / memory["innate"][i])
    return w, g, {**memory, "rate": rates}


def activity_dependent_rates(w, g, memory, draws, nu=0.16, gain=0.1, rate_min=0.5, rate_max=2.0):
    (u,) = draws(len(w), "uniform")
    neurons = memory["shape"][0]
    inputs = len(w) // neurons if neurons else 0
    activity = [sum(abs(x) for x in w[i * inputs : (i + 1) * inputs]) for i in range(neurons)]
    mean = _mean(activity)
    rates = []
    for i in range(len(w)):
        relative = activity[i // inputs] / mean if mean > 0 else 1.0
        width = nu * (2 - min(max(1 + gain * (relative - 1), 0.8), 1.2))
        rate = min(max(1 + width * (2 * u[i] - 1), rate_min), rate_max)
        rates.append(memory["rate"][i] * rate / memory["innate"][i])
    return w, g, {**memory, "rate": rates}


def synaptic_scaling(w, g, memory, draws, target="population", rate=1e-3, decay=0.99, form="linear"):
    neurons = memory["shape"][0]
    inputs = math.prod(memory["shape"][1:])
    mean, count = list(memory["activity"]), list(memory["count"])
    for i in range(neurons):
        x = sum(abs(weight) for weight in w[i * inputs : (i + 1) * inputs])  # the activity that the table hands over
        count[i] += 1
        mean[i] += (1 - decay) / (1 - decay ** count[i]) * (x - mean[i])
    goal = _mean(mean) if target == "population" else target
    weights = []
    for i in range(neurons):
        for j in range(inputs):
            weight = w[i * inputs + j]
            size = abs(weight) if form == "quadratic" else 1.0
            weights.append(weight * max(1 + rate * (goal - mean[i]) * size, 0.5))
    return weights, g, {**memory, "activity": mean, "count": count}


def enforce_dales_principle(w, g, memory, draws, **at_init):
    return [0.0 if w[i] * memory["polarity"][i] < 0 else w[i] for i in range(len(w))], g, memory


def impose_dales_principle(w, g, memory, draws, **at_init):
    return [abs(w[i]) * memory["polarity"][i] for i in range(len(w))], g, memory


def sgd(w, g, memory, draws, momentum=0.0, nesterov=False, weight_decay=0.0):
    decayed = [g[i] + weight_decay * w[i] for i in range(len(w))]
    velocity = [momentum * memory["momentum"][i] + decayed[i] for i in range(len(w))]
    direction = [decayed[i] + momentum * velocity[i] if nesterov else velocity[i] for i in range(len(w))]
    return w, direction, {**memory, "momentum": velocity}


def adam(w, g, memory, draws, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0):
    return _adam(w, [g[i] + weight_decay * w[i] for i in range(len(w))], memory, beta1, beta2, eps, 0.0)


def adamw(w, g, memory, draws, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2):
    return _adam(w, g, memory, beta1, beta2, eps, weight_decay)


def _adam(w, g, memory, beta1, beta2, eps, decoupled):
    t = memory["count"][0] + 1
    mean = [beta1 * memory["mean"][i] + (1 - beta1) * g[i] for i in range(len(w))]
    square = [beta2 * memory["square"][i] + (1 - beta2) * g[i] ** 2 for i in range(len(w))]
    direction = []
    for i in range(len(w)):
        m_hat = mean[i] / (1 - beta1**t)
        v_hat = square[i] / (1 - beta2**t)
        direction.append(m_hat / (math.sqrt(v_hat) + eps) + decoupled * w[i])
    return w, direction, {**memory, "mean": mean, "square": square, "count": [t]}


def descend(w, g, memory, draws, lr=0.1):
    return [w[i] - lr * g[i] for i in range(len(w))], g, memory
