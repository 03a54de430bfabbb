# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: do synapses of their own rate change how a network learns?
#
# We train an ensemble of small networks on handwritten digits, half of them plain, half of them with the mechanisms of
# biofunc, all in one `vmap`. Then we look at the synapses themselves.

# %%
from functools import partial

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.func import functional_call, grad

import biofunc as bf

digits = load_digits()
x = torch.as_tensor(digits.data / 16, dtype=torch.float32)
y = torch.as_tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)


def make_model():
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))


model = make_model()

# %% [markdown]
# ## The rules
#
# A chain reads from top to bottom. `crystallize` looks at the gradient and lowers the rate of synapses that have settled;
# `fuzzy_learning_rates` gives each synapse its own rate and applies it; `descend` moves the weights; then, every 40 steps,
# weak synapses die and new ones grow.

# %%
SEEDS, STEPS = 8, 190


def make_chain(nu):
    return bf.chain(
        partial(bf.crystallize, floor=0.01, recovery=0.01),
        partial(bf.fuzzy_learning_rates, nu=nu),
        bf.descend(lr=0.1),
        bf.every(40, bf.rejuvenate_weights),
    )


learn = make_chain(0.4)
learn

# %% [markdown]
# ## An ensemble in one line
#
# The arm is a hyperparameter like any other: `nu=0`, `dampening_factor=1` and `dre=inf` turn the mechanisms off. Both arms
# have the same seeds, so that they can be compared pair by pair.

# %%
params, _ = bf.ensemble.init(make_model, list(range(SEEDS)) * 2)
keys = bf.random.key(torch.arange(SEEDS).repeat(2))
bio = torch.tensor([0.0] * SEEDS + [1.0] * SEEDS)
state = torch.vmap(lambda p, key, b: make_chain(0.4 * b).init(p, key))(params, keys, bio)
hyper = {"dampening_factor": 1 - 0.4 * bio, "dre": 8 / bio}
bf.ensemble.unstack(state)[0]


# %%
def step(params, state, hyper, x, y):
    grads = grad(lambda p: torch.nn.functional.cross_entropy(functional_call(model, p, (x,)), y))(params)
    params, _, state = learn(params, grads, state, **hyper)
    return params, state


ensemble_step = torch.vmap(step, in_dims=(0, 0, 0, None, None))
accuracy_of = torch.vmap(lambda p: (functional_call(model, p, (x[test],)).argmax(-1) == y[test]).float().mean())

accuracy = []
for i in range(STEPS):
    batch = bf.random.uniform(bf.random.fold_in(bf.random.key(0), i), (1400,)).argsort()[:64]
    params, state = ensemble_step(params, state, hyper, x[train][batch], y[train][batch])
    accuracy.append(accuracy_of(params))
accuracy = 100 * torch.stack(accuracy)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
for arm, name, colour in ((slice(0, SEEDS), "plain", "#000000"), (slice(SEEDS, None), "biofunc", "#D55E00")):
    mean, sd = accuracy[:, arm].mean(1), accuracy[:, arm].std(1)
    left.plot(mean, color=colour, label=name)
    left.fill_between(range(STEPS), mean - sd, mean + sd, color=colour, alpha=0.2, linewidth=0)
left.set(xlabel="step", ylabel="test accuracy (%)", title="Mean and standard deviation over 8 seeds")
left.legend(frameon=False)
rates = state.plasticity["0.weight"][SEEDS:].flatten()
right.hist(rates, bins=60, color="#D55E00")
right.axvline(1, color="black", linestyle=":")
right.set(xlabel="learning-rate factor of a synapse", ylabel="synapses", yscale="log", title="After training")
plt.show()

# %% [markdown]
# ## A member runs on alone
#
# Member 7 of the ensemble is the network of seed 7: take it out and go on without the others.

# %%
alone_params, alone_state, alone_hyper = bf.ensemble.unstack((params, state, hyper))[7]
alone_params, alone_state = step(alone_params, alone_state, alone_hyper, x[train][:64], y[train][:64])
alone_state.step

# %%
difference = accuracy[-1, SEEDS:] - accuracy[-1, :SEEDS]
print(
    f"paired difference to plain: {difference.mean():+.2f} points, standard error {difference.std() / SEEDS**0.5:.2f}"
)
settled = (rates < 0.5).float().mean()
print(f"synapses at less than half the rate: {100 * settled:.0f} %")

# %% [markdown]
# ## What was found
#
# Eight seeds and 190 steps show how the pieces fit, and how far the rates of synapses spread, not that one arm is better:
# the paired difference above comes with its standard error. The dips are the turnover: each time, a tenth or more of the
# synapses is replaced at once. `python -m biofunc compare` asks the question with 32 seeds, arm by
# arm, with intervals.
