"""How long does the full step take to compile, and the library to import?

The step of `step.py` with its three mechanisms and rejuvenation, in fresh processes: with an empty compiler cache, with
the cache it left, and both with `random.accelerate()`. The import is timed after torch and optree.
"""

import argparse
import datetime
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import torch

COMPILE = """
import sys, time, warnings
sys.path.insert(0, {tests!r})
import torch, models
import biofunc as bf
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy

start = time.perf_counter()
if {accelerated}:
    bf.random.accelerate()
taken = time.perf_counter() - start
x, y, model = torch.rand(64, 784), torch.randint(10, (64,)), models.mlp(784, (512, 512), 10)
learn = bf.chain(bf.crystallize, bf.adam(), bf.volume_dependent_lr, bf.fuzzy_learning_rates, bf.descend(0.1),
                 bf.every(100, bf.rejuvenate_weights))

def step(params, state):
    grads = grad(lambda p: cross_entropy(functional_call(model, p, (x,)), y))(params)
    params, _, state = learn(params, grads, state)
    return params, state

params = {{path: p.detach().clone() for path, p in model.named_parameters()}}
state = learn.init(params, bf.random.key(0))
start = time.perf_counter()
torch.compile(step, fullgraph=True)(params, state)
print(taken + time.perf_counter() - start)
"""
IMPORT = "import time, torch, optree; start = time.perf_counter(); import biofunc; print(time.perf_counter() - start)"


def seconds(code: str, cache: str) -> float:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    rows = []
    for accelerated in (False, True):
        code = COMPILE.format(tests=str(pathlib.Path(__file__).parent.parent), accelerated=accelerated)
        with tempfile.TemporaryDirectory() as cache:
            suffix = ", accelerated" if accelerated else ""
            rows.append((f"first step, empty cache{suffix}", seconds(code, cache), 30.0))
            rows.append((f"first step, from the cache{suffix}", seconds(code, cache), 5.0))
    rows.append(("import biofunc", statistics.median(seconds(IMPORT, "") for _ in range(7)), 0.3))
    print(f"{__doc__}\ntorch {torch.__version__}, {os.cpu_count()} cores, {datetime.date.today()}\n")
    print("| what | seconds | at most |\n|---|---|---|")
    for what, value, bound in rows:
        print(f"| {what} | {value:.3g} | {bound}{'' if value <= bound else ' **missed**'} |")
    if options.json:
        options.json.write_text(json.dumps([dict(zip(("what", "seconds", "bound"), row, strict=True)) for row in rows]))


if __name__ == "__main__":
    main()
