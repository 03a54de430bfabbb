"""Runs every benchmark, one process after another, and writes what they print to docs/benchmarks.md."""

import pathlib
import subprocess
import sys

import torch

HERE = pathlib.Path(__file__).parent
SCRIPTS = ("ensemble", "resnet", "step", "mechanisms", "draws", "bandwidth", "memory", "scale", "compile_time")
TEXT = """# Benchmarks

`make bench` writes this page; close everything else meanwhile. Times are medians ± interquartile range, ours and the
rival's taken in turns in one process; "busy" is how many cores other processes used. Each row says which way round its
ratio is. A missed target says so. One script alone, in a minute: `python tests/benchmarks/draws.py --threads 1`; with
`--quick`, in seconds, it only shows that it runs.
"""
ON_GPU = (
    ("ensemble", "a step of one of 1024 perceptrons 64-128-10", "0.0.5, one after another", ">= 200"),
    ("ensemble", "a step of one of 8192 perceptrons 64-128-10", "0.0.5, one after another", ">= 200"),
    ("resnet", "volume, fuzzy, crystallize on ResNet-18", "0.0.5", ">= 5"),
    ("resnet", "the same and rejuvenation", "0.0.5", ">= 6"),
    ("step", "a whole step without a mechanism", "torch.optim.SGD", "<= 1.5"),
    ("step", "a whole step with three mechanisms", "torch.optim.SGD", "<= 2"),
    ("mechanisms", "deterministic mechanisms, eager", "0.0.5", "<= 1"),
    ("mechanisms", "random mechanisms, eager", "torch.randn", "<= 8"),
    ("draws", "1,000,000 uniforms, compiled", "torch.rand", "<= 0.5"),
    ("draws", "1,000,000 normals, compiled", "torch.randn", "<= 0.75"),
    ("bandwidth", "three mechanisms on 100 million weights, compiled", "out.copy_(x)", ">= 0.7"),
)


def output(name: str, *arguments: str) -> str:
    command = [sys.executable, str(HERE / f"{name}.py"), *arguments]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    print(run.stdout, flush=True)
    return run.stdout.strip()


def not_measured() -> str:
    """The table of a machine without a GPU: what is aimed at there, and no figure."""
    rows = [
        f"| {script}.py | {work} | {rival} | {target} | not measured: no CUDA device here |"
        for script, work, rival, target in ON_GPU
    ]
    return "\n".join(["| script | work | rival | must reach | ratio |", "|---|---|---|---|---|", *rows])


def gpu_page() -> str:
    text = "## GPU\n\nThe same scripts with `--device cuda`, both sides on the same device.\n\n"
    if not torch.cuda.is_available():
        return text + not_measured() + "\n"
    scripts = dict.fromkeys(script for script, *_ in ON_GPU)
    return text + "\n\n".join(f"### {name}.py\n\n{output(name, '--device', 'cuda')}" for name in scripts) + "\n"


def main() -> None:
    pages = [TEXT, *[f"## {name}.py\n\n{output(name)}\n" for name in SCRIPTS], gpu_page()]
    (HERE.parent.parent / "docs" / "benchmarks.md").write_text("\n".join(pages))


if __name__ == "__main__":
    main()
