"""How does the cost of a step grow with members, with leaves and with weights?

Members: perceptrons 64-128-10 with three mechanisms, batch 64, whole and in chunks, compiled; seconds per member and
step, within 1.3 times of the best from 32 members upwards. Leaves: 1e6 weights in few or many tensors. Weights: one
tensor up to 1e7, several above, against the time in which memory moves what must be read and written once. The last
two time crystallisation, volume-dependent and fuzzy rates and descent, compiled and eager, without a model. Medians,
but for a single call above 1e7 weights.
"""

import argparse
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import duration
from memory import MECHANISMS, ensemble, stepper, vmapped
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import biofunc as bf

HERE = pathlib.Path(__file__).parent
MEMBERS = (1, 4, 8, 32, 128, 512, 1024, 4096)
SIZES = (16, 32, 64, 128)
LEAVES = (1, 5, 20, 100, 500)
PARAMETERS = tuple(10**power for power in range(3, 9))
TOTAL, LARGEST, COMPILING, SPREAD = 10**6, 10**7, 60.0, 1.3
RULES = (bf.crystallize, bf.volume_dependent_lr, bf.fuzzy_learning_rates, bf.descend(0.1))
Point = dict[str, Any]


def once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(functions: list[Callable[[], object]], seconds: float = 1.0, rounds: int = 7) -> list[float]:
    """Seconds per call, in turns: what disturbs one disturbs the others."""
    warm = [min(once(function), once(function)) for function in functions]
    repeats = [max(1, int(seconds / rounds / each)) for each in warm]
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds if sum(warm) < seconds else 3):
        for kept, function, count in zip(samples, functions, repeats, strict=True):
            kept.append(once(lambda function=function, count=count: [function() for _ in range(count)]) / count)
    return [sorted(kept)[len(kept) // 2] for kept in samples]


def members(counts: tuple[int, ...]) -> list[Point]:
    """Seconds per member and step, by number of members and of members per chunk."""
    step = torch.compile(vmapped(MECHANISMS), fullgraph=True, dynamic=False)
    points = []

    def timed(count: int, sizes: list[int]) -> list[float]:
        whole = ensemble(MECHANISMS, count)
        runs = [stepper(step, bf.ensemble.split(whole, size)) for size in sizes]
        del whole
        return [each / count for each in medians([*runs])]

    searched = min(512, max(counts))
    candidates = timed(searched, list(SIZES))
    best = SIZES[candidates.index(min(candidates))]
    points += [
        {"members": searched, "chunk": s, "seconds": t}
        for s, t in zip(SIZES, candidates, strict=True)
        if s != best and s != searched
    ]
    for count in tqdm(counts, desc="members", leave=False):
        sizes = [count, best] if count > best else [count]
        points += [
            {"members": count, "chunk": size, "seconds": each}
            for size, each in zip(sizes, timed(count, sizes), strict=True)
        ]
    for point in points:
        point["best chunk"] = best
    return points


def synapses(weights: int, leaves: int) -> tuple[Any, Any, Any]:
    """Parameters, gradients and state of so many weights in so many leaves of 100 columns (10 if those are few)."""
    columns = 100 if weights // leaves >= 1000 else 10
    generator = torch.Generator().manual_seed(0)
    params, grads = [
        {f"{i}": 0.1 * torch.randn(weights // leaves // columns, columns, generator=generator) for i in range(leaves)}
        for _ in range(2)
    ]
    return params, grads, bf.chain(*RULES).init(params, bf.random.key(0))


def stepped(weights: int, leaves: int, compiled: bool) -> tuple[Callable[[], None], int]:
    """A function that makes one step of the chain, and the bytes that a step must move."""
    params, grads, state = synapses(weights, leaves)
    learn = bf.chain(*RULES)

    def step(params: Any, grads: Any, state: Any) -> Any:
        params, _, state = learn(params, grads, state)
        return params, state

    function = torch.compile(step, fullgraph=True, dynamic=False) if compiled else step
    now = [params, state]

    def run() -> None:
        now[:] = function(now[0], grads, now[1])

    # A leaf that comes back as the same object is neither read nor written
    example = synapses(1000, 1)
    after = step(*example)
    changed = sum(
        new.element_size() * new.numel()
        for old, new in zip(tree_leaves((example[0], example[2])), tree_leaves(after), strict=True)
        if new is not old and new.numel() > 1
    )
    return run, (2 * changed + 4 * 1000) * weights // 1000


def leaves(counts: tuple[int, ...]) -> list[Point]:
    """Seconds per step of as many weights in more and more leaves, and what compiling takes."""
    points: list[Point] = []
    compiling, before = 0.0, counts[0]
    for count in tqdm(counts, desc="leaves", leave=False):
        weights = TOTAL // count
        eager, _ = stepped(weights * count, count, compiled=False)
        point: Point = {"leaves": count, "weights": weights * count}
        # Compiling takes at least proportional time, so that a step left out would have taken longer
        expected = compiling * count / before
        if expected > COMPILING:
            point |= {"eager": medians([eager])[0], "expected compiling": expected}
        else:
            torch._dynamo.reset()
            compiled, _ = stepped(weights * count, count, compiled=True)
            compiling, before = once(compiled), count
            point["compiling"] = compiling
            point["compiled"], point["eager"] = medians([compiled, eager])
        points.append(point)
    return points


def parameters(counts: tuple[int, ...]) -> list[Point]:
    """Seconds per step by number of weights, and the time in which memory moves the bytes of a step."""
    points: list[Point] = []
    x, out = torch.rand(LARGEST), torch.rand(LARGEST)
    copy = medians([lambda: out.copy_(x)])[0]
    for weights in tqdm(counts, desc="weights", leave=False):
        count = max(1, weights // LARGEST)
        torch._dynamo.reset()
        compiled, moved = stepped(weights, count, compiled=True)
        compiled()
        point: Point = {"weights": weights, "leaves": count, "moving": copy * moved / (8 * LARGEST)}
        if weights > LARGEST:
            point["compiled"] = once(compiled)
        else:
            eager, _ = stepped(weights, count, compiled=False)
            point["compiled"], point["eager"] = medians([compiled, eager])
        points.append(point)
    return points


def tables(study: dict[str, list[Point]]) -> list[str]:
    lines: list[str] = []
    if points := study.get("members"):
        best = points[0]["best chunk"]
        lines += ["| members | whole | in chunks | of |", "|---|---|---|---|"]
        for count in sorted({point["members"] for point in points}):
            own = {point["chunk"]: point["seconds"] for point in points if point["members"] == count}
            rows = [(size, each) for size, each in own.items() if size != count] or [("-", None)]
            for size, each in rows:
                cell = duration(each) if each else "-"
                lines.append(f"| {count} | {duration(own[count])} | {cell} | {size} |")
        chunked = curve(points, best)
        whole = curve(points, None)
        for name, series in (("whole", whole), (f"in chunks of {best}", chunked)):
            lowest = min(series.values())
            worst = max(each for count, each in series.items() if count >= 32) / lowest
            mark = "reached" if worst <= SPREAD else "**missed**"
            lines.append(f"\n{name}: at most {worst:.2f} times the best from 32 members upwards, <= {SPREAD} {mark}")
    if points := study.get("leaves"):
        lines += ["", "| leaves | compiled | eager | compiling |", "|---|---|---|---|"]
        for p in points:
            compiled = duration(p["compiled"]) if "compiled" in p else "-"
            cost = duration(p["compiling"]) if "compiling" in p else f"not tried, > {p['expected compiling']:.0f} s"
            lines.append(f"| {p['leaves']} | {compiled} | {duration(p['eager'])} | {cost} |")
    if points := study.get("parameters"):
        lines += ["", "| weights | leaves | compiled, per weight | eager | moving the bytes |", "|---|---|---|---|---|"]
        for p in points:
            cells = [f"{p[name] / p['weights'] * 1e9:.3g} ns" if name in p else "-" for name in LINES]
            lines.append(f"| {p['weights']:.0e} | {p['leaves']} | {' | '.join(cells)} |")
    return lines


LINES = ("compiled", "eager", "moving")


def curve(points: list[Point], chunk: int | None) -> dict[int, float]:
    """Seconds per member and step by number of members; fewer than a chunk run as they are."""
    chosen = [p for p in points if p["chunk"] == (p["members"] if chunk is None else min(chunk, p["members"]))]
    return {p["members"]: p["seconds"] for p in sorted(chosen, key=lambda p: p["members"])}


def draw(study: dict[str, list[Point]], path: pathlib.Path) -> None:
    """Draws the parts that were measured, one panel each."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    blue, orange, grey = "#0072b2", "#d55e00", "#555555"
    figure, axes = plt.subplots(1, len(study), figsize=(4.2 * len(study), 3.6), squeeze=False, layout="constrained")
    for axis, (part, points) in zip(axes[0], study.items(), strict=True):
        lines: list[tuple[str, dict[int, float], str, str]] = []
        if part == "members":
            best = points[0]["best chunk"]
            lines = [
                ("whole", {n: 1e6 * each for n, each in curve(points, None).items()}, orange, "s-"),
                (f"chunks of {best}", {n: 1e6 * each for n, each in curve(points, best).items()}, blue, "o-"),
            ]
            axis.set(title="Members of an ensemble", xlabel="members", ylabel="µs per member and step")
        elif part == "leaves":
            for name, colour, style in (("eager", orange, "s-"), ("compiled", blue, "o-"), ("compiling", grey, "^:")):
                lines.append((name, {p["leaves"]: 1e3 * p[name] for p in points if name in p}, colour, style))
            axis.set(title=f"Leaves, {TOTAL:,} weights in all", xlabel="leaves", ylabel="ms per step")
        else:
            for name, colour, style in (("eager", orange, "s-"), ("compiled", blue, "o-"), ("moving", grey, "--")):
                line = {p["weights"]: 1e9 * p[name] / p["weights"] for p in points if name in p}
                lines.append(("moving the bytes" if name == "moving" else name, line, colour, style))
            axis.set(title="Weights", xlabel="weights", ylabel="ns per weight and step")
        axis.set(xscale="log", yscale="log")
        for _, line, colour, style in lines:
            axis.plot(list(line), list(line.values()), style, color=colour, markersize=4)
        axis.margins(y=0.15)
        lowest = min(lines, key=lambda each: list(each[1].values())[-1])[0]
        for name, line, colour, _ in lines:
            under = name == lowest
            axis.annotate(
                name,
                list(line.items())[-1],
                (0, -7 if under else 7),
                textcoords="offset points",
                color=colour,
                ha="right",
                va="top" if under else "bottom",
            )
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if part == "members" else (1,)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        for ticks in (axis.yaxis,) if part == "parameters" else (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> None:
    parts = {"members": (members, MEMBERS), "leaves": (leaves, LEAVES), "parameters": (parameters, PARAMETERS)}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=parts, nargs="+", default=list(parts))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerate", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--quick", action="store_true", help="the smaller half of every part")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path, help="default: docs/scale.png if all of it is measured")
    options = parser.parse_args()
    cache = tempfile.TemporaryDirectory()
    # A cache from an earlier run would hide what compiling costs; whoever sets one takes that on
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache.name)
    torch.set_num_threads(options.threads)
    bf.random.accelerate(options.accelerate)
    torch._dynamo.config.recompile_limit = 64  # one graph per number of members
    study, took = {}, time.perf_counter()
    for part in options.part:
        measure, counts = parts[part]
        study[part] = measure(counts[: -len(counts) // 2] if options.quick else counts)
    machine = f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"
    print(f"{__doc__}\n{machine}, {options.threads} threads, {time.perf_counter() - took:.0f} s\n")
    print("\n".join(tables(study)))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "threads": options.threads, **study}, indent=1))
    complete = len(study) == len(parts) and not options.quick
    if options.picture or complete:
        draw(study, options.picture or HERE.parent.parent / "docs" / "scale.png")


if __name__ == "__main__":
    main()
