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
# # Continual learning: does a network stay able to learn?
#
# A network that has learnt many tasks learns the next one worse: units fall silent, and what is left varies in few
# directions. This is called loss of plasticity. A brain learns for decades, and its synapses turn over and settle all
# the while. Do turnover and settling keep a network plastic, next to a remedy from machine learning?

# %%
import os
from functools import partial

import matplotlib.pyplot as plt
import torch
from torch.func import functional_call, grad

import biofunc as bf
from biofunc import datasets
from biofunc.statistics import bca_interval, sign_flip_test
from biofunc.studies.l2_init import l2_init

QUICK = "BIOFUNC_QUICK" in os.environ
SEEDS, TASKS, EPOCHS, SAMPLES, BATCH = (2, 3, 2, 200, 20) if QUICK else (12, 15, 30, 400, 20)

digits = datasets.load("digits")

# %% [markdown]
# ## The tasks
#
# A task is to learn 400 digits by heart under random labels, and each task has new labels. There is nothing to transfer
# from one to the next, so a network that keeps its plasticity learns each as well as the first. Every seed has its own
# digits, labels and order of batches, the same for all arms.

# %%
keys = bf.random.key(torch.arange(SEEDS))
x = digits.inputs[bf.random.uniform(bf.random.fold_in(keys, "digits"), (1797,)).argsort(-1)[:, :SAMPLES]]


def labels_of(task):
    key = bf.random.fold_in(bf.random.fold_in(keys, "labels"), task)
    return bf.random.uniform(key, (SAMPLES,)).argsort(-1) % 10  # as many of each


def batches_of(task):
    key = bf.random.fold_in(bf.random.fold_in(keys, "order"), task)
    order = bf.random.uniform(key, (EPOCHS, SAMPLES)).argsort(-1)
    return order.reshape(SEEDS, -1, BATCH).unbind(1)


# %% [markdown]
# ## The arms
#
# All arms are one chain, in which what an arm does not have is off. So the arm is a hyperparameter, and arms and seeds
# are members of one ensemble.
#
# - **rejuvenation**: every 100 steps the weakest 0.3 % of the synapses die, and new ones grow in their place. A new synapse
#   is new for Adam too: its moments and its step count start again.
# - **crystallisation**: a synapse that has settled (its gradient is small for its size, or larger than a mean weight) loses
#   a tenth of its learning rate, down to a tenth of what it was born with; others recover by a hundredth per step.
# - **L2 Init**: all parameters are pulled to where they began (Kumar et al. 2023).
#
# No arm is told where a task ends. The learning rate, Adam's with 0.005, is one at which plain is known to lose its
# plasticity; strengths are from the middle of the range in which `biofunc/studies/plasticity_high_rate.toml` tunes them,
# not tuned here.

# %%
arms = {
    "plain": {},
    "rejuvenation": {"rate": 0.003},
    "crystallisation": {"dampening_factor": 0.9, "floor": 0.1, "recovery": 0.01},
    "L2 Init": {"strength": 1e-3},
}
off = {"rate": 0.0, "dampening_factor": 1.0, "floor": 0.0, "recovery": 0.0, "strength": 0.0}
hyper = {
    name: torch.tensor([{**off, **setting}[name] for setting in arms.values()]).repeat_interleave(SEEDS) for name in off
}


def make_model():
    return torch.nn.Sequential(
        torch.nn.Linear(64, 50), torch.nn.ReLU(), torch.nn.Linear(50, 50), torch.nn.ReLU(), torch.nn.Linear(50, 10)
    )


learn = bf.chain(l2_init, bf.crystallize, bf.adam(), partial(bf.fuzzy_learning_rates, nu=0), bf.descend(lr=0.005))
params, _ = bf.ensemble.init(make_model, list(range(SEEDS)) * len(arms))
member_keys = keys.repeat(len(arms), 1)
state = torch.vmap(lambda p, key: bf.init(p, key, *learn.rules, bf.rejuvenate_weights))(params, member_keys)
model = make_model()
record = bf.record_activity(model)

# %% [markdown]
# A step learns from a batch and says how many of its labels were right before. That is the online accuracy: what counts
# is how fast a network learns, not what it knows in the end. 0.1 is chance.


# %%
def step(params, state, hyper, x, y):
    def loss(params):
        y_hat, _ = record(params, {}, x)
        return torch.nn.functional.cross_entropy(y_hat, y), y_hat

    grads, y_hat = grad(loss, has_aux=True)(params)
    settling = {name: hyper[name] for name in ("dampening_factor", "floor", "recovery", "strength")}
    params, _, state = learn(params, grads, state, **settling)
    return params, state, (y_hat.argmax(-1) == y).float().mean()


def renew(params, state, hyper):
    params, _, state = bf.rejuvenate_weights(params, params, state, rate=hyper["rate"])
    return params, state


def look(params, x):
    """Share of hidden units that are silent on all samples of the task, and effective rank of the last hidden layer."""
    _, activity = record(params, {}, x)
    features = functional_call(model[:4], {path: params[path] for path in list(params)[:4]}, (x,))
    dead = bf.measure.dead_unit_fraction({path: activity[path] for path in ("0.weight", "2.weight")})
    return dead, bf.measure.effective_rank(features)


ensemble_step, ensemble_renew, ensemble_look = torch.vmap(step), torch.vmap(renew), torch.vmap(look)
if not QUICK:
    ensemble_step = torch.compile(ensemble_step)
torch.set_flush_denormal(True)  # moments of silent units decay into denormal numbers, which are slow
members = torch.arange(SEEDS * len(arms)).unsqueeze(1) % SEEDS

online, silent, rank, steps = [], [], [], 0
for task in range(TASKS):
    y, right = labels_of(task), []
    for batch in batches_of(task):
        batch = batch.repeat(len(arms), 1)
        params, state, correct = ensemble_step(params, state, hyper, x[members, batch], y[members, batch])
        right.append(correct)
        steps += 1
        if steps % 100 == 0:
            params, state = ensemble_renew(params, state, hyper)
    dead, directions = ensemble_look(params, x.repeat(len(arms), 1, 1))
    online.append(torch.stack(right).mean(0))
    silent.append(dead)
    rank.append(directions)


def by_arm(values):
    """`(seeds, tasks)` by arm."""
    return dict(zip(arms, torch.stack(values, 1).split(SEEDS), strict=True))


online, silent, rank = by_arm(online), by_arm(silent), by_arm(rank)

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), dpi=90, layout="constrained")
task_numbers = range(1, TASKS + 1)
for ax, curves, ylabel in zip(
    axes,
    (online, {a: 100 * s for a, s in silent.items()}, rank),
    ("online accuracy", "silent units (%)", "effective rank"),
    strict=True,
):
    bf.plot.learning_curves(curves, task_numbers, baseline="plain", ax=ax)
    ax.set(xlabel="task", ylabel=ylabel, xticks=range(1, TASKS + 1, 2))
axes[0].axhline(0.1, color="#999999", linewidth=0.8)
for ax in axes[1:]:
    ax.get_legend().remove()
plt.show()

# %% [markdown]
# Bands are 95 % of the mean over seeds; the grey line is chance.
#
# ## Arm by arm
#
# The last tasks against the first ones say whether an arm keeps its plasticity; the paired difference to plain says what
# it gains over all tasks. Intervals are 95 % BCa bootstrap over seeds, p is of the sign-flip test.

# %%
print(f"{'arm':17}{'first 3 tasks':>14}{'last 3 tasks':>14}{'silent':>9}{'rank':>7}   mean over tasks, minus plain")
differences = {}
for arm in arms:
    accuracy = online[arm]
    line = f"{arm:17}{accuracy[:, :3].mean():14.3f}{accuracy[:, -3:].mean():14.3f}"
    line += f"{100 * silent[arm][:, -3:].mean():7.0f} %{rank[arm][:, -3:].mean():7.1f}"
    if arm != "plain":
        d = (accuracy - online["plain"]).mean(1).tolist()
        differences[arm] = (sum(d) / SEEDS, *bca_interval(d))
        line += f"   {differences[arm][0]:+.3f} [{differences[arm][1]:+.3f}, {differences[arm][2]:+.3f}], p = {sign_flip_test(d):.4f}"
    print(line)

# %%
figure, ax = plt.subplots(figsize=(6.5, 2.2), dpi=90, layout="constrained")
bf.plot.forest(differences, ax=ax)
ax.set(xlabel="online accuracy over all tasks, minus plain [95 % CI]")
plt.show()

# %% [markdown]
# ## The synapses afterwards
#
# What has become of the learning rates where synapses crystallise, and of the sizes of the weights?

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), dpi=90, layout="constrained")
arm_of = dict(zip(arms, range(0, SEEDS * len(arms), SEEDS), strict=True))
start = arm_of["crystallisation"]
bf.plot.rate_spectrum(state.plasticity["2.weight"][start : start + SEEDS], ax=left)
left.set(title="crystallisation: rates of the second layer")
for (arm, start), colour in zip(arm_of.items(), bf.plot.COLOURS, strict=False):
    sizes = params["2.weight"][start : start + SEEDS].abs().flatten()
    right.plot(sizes.sort().values, torch.linspace(0, 1, len(sizes)), color=colour, label=arm)
right.set(xscale="log", xlim=(1e-3, None), xlabel="synaptic size |w|, second layer", ylabel="share of synapses below")
right.legend(frameon=False, fontsize="small")
plt.show()

# %% [markdown]
# ## What was found
#
# - Plain loses its plasticity: online accuracy falls from 0.32 in the first three tasks to 0.12 in the last three, where
#   0.1 is chance; 77 % of its hidden units are silent then, and its last hidden layer varies in 4 directions of 50.
# - L2 Init keeps it: 0.33 and 0.34, 16 % silent units, 27 directions; over all tasks 0.154 [0.133, 0.175] above plain.
# - Crystallisation with recovery gains a little over all tasks, +0.014 [+0.002, +0.024], and does not stop the decline: 0.12
#   in the last tasks, with as many silent units as plain.
# - Rejuvenation at this strength harms: -0.024 [-0.036, -0.013]. Fewer units are silent, 62 %, and yet the network varies in
#   fewer directions, not more. New synapses are drawn up to the size of the largest weight of their layer, so that after
#   some tasks each turnover puts in strong random synapses.
#
# One strength per mechanism, one learning rate, fifteen tasks: a picture of what happens, not a contest. The study in
# `biofunc/studies/plasticity_high_rate.toml`, `python -m biofunc experiment`, tunes each arm in four strengths, has random
# turnover as a control, and judges on seeds on which nothing was chosen.
