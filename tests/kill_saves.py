"""Kills a training process that saves all the time, and lets another go on: `python tests/kill_saves.py 50`.

Half of the kills come at a random moment of the run, half when a save has just begun. Prints what happened as JSON.
"""

import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from functools import partial

import torch
from helpers import assert_same, mlp

import biofunc as bf

STEPS, PERIOD = 20, 2
LEARN = bf.chain(
    bf.crystallize,
    bf.adam(),
    partial(bf.fuzzy_learning_rates, nu=0.3),
    bf.descend(lr=bf.schedules.cosine(0.05, 0.001, STEPS)),
    bf.every(3, partial(bf.rejuvenate_weights, dre=1.0)),
)


def start():
    params, _ = mlp()
    ballast = torch.arange(500_000.0)  # so that a save takes longer than the other work of a step
    return {"params": params, "state": LEARN.init(params, bf.random.key(3)), "step": 0, "ballast": ballast}


def train(path, save=True):
    """Goes on from the checkpoint, if there is one, to the last step."""
    run = start()
    if path.exists():
        run = bf.load(path, like=run, rules=LEARN)
    for step in range(run["step"], STEPS):
        grads = {name: w.sin() + 0.1 * step for name, w in run["params"].items()}
        params, _, state = LEARN(run["params"], grads, run["state"])
        run = {**run, "params": params, "state": state, "step": step + 1}
        if save and run["step"] % PERIOD == 0:
            bf.save(path, run, rules=LEARN)
    return run


def arrays(run):
    return {name: part if name != "step" else torch.tensor(part) for name, part in run.items()}


def fork(path):
    child = os.fork()
    if child == 0:
        try:
            train(path)
        finally:
            os._exit(0)
    return child


def saving(folder):
    return {name for name in os.listdir(folder) if name.endswith(".tmp")}


def wait_for_a_save(child, folder, number):
    """Returns when the process has begun a save that is at least its number-th, or has ended."""
    seen = set()
    while len(seen) < number and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        seen |= saving(folder)


def main(kills):
    torch.set_num_threads(1)
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        expected = train(pathlib.Path(folder) / "run", save=False)
        os.waitpid(fork(pathlib.Path(folder) / "run"), 0)
        duration = time.perf_counter() - began
    names = ("kills", "same", "during a save", "before the first save", "temporaries left in the end")
    counts = dict.fromkeys(names, 0)
    while counts["kills"] < kills:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "run"
            child = fork(path)
            if counts["kills"] % 2:
                time.sleep(chance.uniform(0, duration))
            else:
                wait_for_a_save(child, folder, chance.randint(1, STEPS // PERIOD // 2))
                time.sleep(chance.uniform(0, 0.003))
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status):  # it had come to its end
                continue
            counts["kills"] += 1
            counts["during a save"] += bool(saving(folder))
            counts["before the first save"] += not path.exists()
            resumed = train(path)
            try:
                assert_same(arrays(resumed), arrays(expected))
                counts["same"] += 1
            except AssertionError as error:
                print(error, file=sys.stderr)
            counts["temporaries left in the end"] += bool(saving(folder))
    return counts


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]))))
