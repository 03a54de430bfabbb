"""Does every mechanism at once, converted in one line, run on the networks that people train?

Each network is an ensemble of 3 members in one compiled step (inductor, fullgraph) for 50 steps under Adam, once with
weight splitting and once with Dale's principle. `python tests/benchmarks/three_networks.py` takes about nine minutes.
"""

import time

import torch
from harness import models
from torch.func import grad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import biofunc as bf

MEMBERS, STEPS, BATCH = 3, 50, 16
NETWORKS = {
    "3-layer MLP": (models.mlp, (64,)),
    "ResNet-18, width 8": (lambda: models.ResNet18(8), (3, 32, 32)),
    "Transformer encoder": (models.Encoder, (6, 16)),
}
SETTINGS = {"splitting": {"weight_splitting_Gamma": 2}, "Dale's principle": {"apply_dales_principle": True}}


def train(make, shape, settings):
    """Seconds of the first step and of the others, mean loss of the first and the last ten steps."""
    torch.manual_seed(0)
    bio = bf.convert(make, lr=0.01, base_lr=0.5, optimizer=bf.adam(), rejuvenation_period=20, **settings)
    x, y = torch.randn(BATCH, *shape), torch.randint(10, (BATCH,))

    def step(params, buffers, state):
        def loss(p):
            logits, new = bio.apply_and_update(p, buffers, x)
            value = cross_entropy(logits, y)
            return value, (value, new)

        grads, (value, buffers) = grad(loss, has_aux=True)(params)
        params, _, state = bio.learn(params, grads, state)
        return params, buffers, state, value

    params, buffers = [
        {name: leaf.expand(MEMBERS, *leaf.shape).clone() for name, leaf in tree.items()}
        for tree in (bio.params, bio.buffers)
    ]
    params, state = torch.vmap(bio.init)(params, bf.random.key(torch.arange(MEMBERS)))
    ensemble_step = torch.compile(torch.vmap(step), fullgraph=True)
    losses, seconds = [], []
    for _ in tqdm(range(STEPS), leave=False):
        start = time.perf_counter()
        params, buffers, state, value = ensemble_step(params, buffers, state)
        seconds.append(time.perf_counter() - start)
        losses.append(value.mean().item())
    if not all([leaf.isfinite().all() for leaf in params.values()]):
        raise SystemExit("a parameter is not finite")
    return seconds[0], sum(seconds[1:]), sum(losses[:10]) / 10, sum(losses[-10:]) / 10


print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {MEMBERS} members, {STEPS} steps, batch {BATCH}")
print("| network | with | first step | other 49 steps | loss, first 10 | loss, last 10 |\n|---|---|---|---|---|---|")
with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
    for network, (make, shape) in NETWORKS.items():
        for name, settings in SETTINGS.items():
            first, others, before, after = train(make, shape, settings)
            print(f"| {network} | {name} | {first:.0f} s | {others:.2f} s | {before:.2f} | {after:.2f} |", flush=True)
