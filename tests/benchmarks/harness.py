"""Times of biofunc and of a rival, taken in turns in one process: what disturbs one disturbs the other.

Every script answers one question: `python tests/benchmarks/draws.py --threads 2 --json draws.json`. Times are medians
over rounds of torch.utils.benchmark, with the interquartile range; "busy" is how much of the machine other processes
used meanwhile, in cores. `--device cuda` runs the same comparison on a GPU, where threads mean nothing. `--quick` only
shows that a script runs; its figures are worthless.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils.benchmark import Measurement, Timer
from tqdm import tqdm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import models  # noqa: F401  # tests/models.py, for the scripts

QUICK = False
"""Whether rounds are cut short, to see that a script runs."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: what was timed against what, seconds per call, and the ratio that it must reach.

    ratio is ours / rival where the target is a largest one ("<= 2") or none (""), rival / ours where it is a smallest
    one (">= 5") or a ratio of that kind without a bound (">=").
    """

    case: str
    rival: str
    threads: int | None
    ours: float
    ours_iqr: float
    theirs: float
    theirs_iqr: float
    target: str
    busy: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours if self.target.startswith(">=") else self.ours / self.theirs

    @property
    def reached(self) -> bool:
        if not self.target[2:]:
            return True
        bound = float(self.target[2:])
        return self.ratio >= bound if self.target.startswith(">=") else self.ratio <= bound


def race(
    case: str,
    ours: Callable[[], object],
    rival: str,
    theirs: Callable[[], object],
    target: str,
    *,
    threads: int | None,
    before: Callable[[], object] | None = None,
    per: tuple[float, float] = (1, 1),
    seconds: float = 0.25,
    rounds: int = 3,
) -> Row:
    """Times two functions in turns.

    before: what is done before every call of both, untimed; per: how many units of work (members, steps) a call does.
    """
    if QUICK:
        seconds, rounds = 0.01, 1
    timers = []
    for function in (ours, theirs):
        names = {"function": function, "before": before or (lambda: None)}
        timers.append(Timer("function()", "before()", globals=names, num_threads=threads or 1))
    for timer in timers:  # compilation, caches, the allocator's thresholds
        timer.timeit(1)
        timer.timeit(1)
    samples: list[list[Measurement]] = [[], []]
    idle = _Others()
    for _ in tqdm(range(rounds), desc=case, leave=False):
        for kept, timer in zip(samples, timers, strict=True):
            once = timer.timeit(1)
            number = 1 if before or once.median > seconds else max(1, int(seconds / once.median))
            repeats = max(1, int(seconds / (number * once.median)))
            kept += [timer.timeit(number) for _ in range(repeats)]
    one, two = [Measurement.merge(kept)[0] for kept in samples]
    return Row(
        case,
        rival,
        threads,
        one.median / per[0],
        one.iqr / per[0],
        two.median / per[1],
        two.iqr / per[1],
        target,
        idle.cores(),
    )


class _Others:
    """Cores that other processes use, since it was made."""

    def __init__(self) -> None:
        self.start = (time.perf_counter(), self._machine(), self._own())

    def cores(self) -> float:
        wall = time.perf_counter() - self.start[0]
        return max(0.0, ((self._machine() - self.start[1]) - (self._own() - self.start[2])) / wall)

    @staticmethod
    def _machine() -> float:
        stat = pathlib.Path("/proc/stat")
        if not stat.exists():
            return 0.0
        user, nice, system, _, _, irq, softirq, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def _own() -> float:
        return sum(os.times()[:2])


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def table(rows: Iterable[Row]) -> Iterator[str]:
    yield "| work | threads | biofunc | rival | ratio, of times | must reach | busy |"
    yield "|---|---|---|---|---|---|---|"
    for row in rows:
        ours = f"{duration(row.ours)} ± {duration(row.ours_iqr)}"
        theirs = f"{row.rival}: {duration(row.theirs)} ± {duration(row.theirs_iqr)}"
        mark = "" if row.reached else " **missed**"
        of = "rival / biofunc" if row.target.startswith(">=") else "biofunc / rival"
        cells = [
            row.case,
            row.threads or "-",
            ours,
            theirs,
            f"{of} {row.ratio:.2f}",
            f"{row.target if row.target[2:] else '-'}{mark}",
            f"{row.busy:.1f}",
        ]
        yield f"| {' | '.join(map(str, cells))} |"


def main(
    question: str,
    measure: Callable[[int | None, argparse.Namespace], Iterable[Row]],
    more: Callable[[argparse.ArgumentParser], object] = lambda parser: None,
) -> None:
    """Runs a script's measurements, prints them and writes them down.

    measure: rows for a number of threads (None on a GPU) and the options, of which `device` is a torch.device; more:
    adds options of the script's own.
    """
    global QUICK
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2; on the CPU alone")
    parser.add_argument("--quick", action="store_true", help="one short round on one thread: does the script run?")
    parser.add_argument("--json", type=pathlib.Path)
    more(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: --device cuda: no CUDA device here; give cpu\n")
    QUICK, options.device = options.quick, torch.device(options.device)
    machine = (
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    )
    choices: list[int | None] = options.threads or ([1] if options.quick else [1, 2])
    if options.device.type == "cuda":
        machine, choices = f"{torch.cuda.get_device_name(options.device)}, {machine}", [None]
    rows = []
    for threads in choices:
        if threads:
            torch.set_num_threads(threads)
        rows += list(measure(threads, options))
    head = "**quick: worthless figures**\n\n" if options.quick else ""
    print(f"{head}{question}\n\n{machine}, {datetime.date.today()}\n")
    print("\n".join(table(rows)))
    if options.json:
        written = {
            "question": question,
            "machine": machine,
            "date": str(datetime.date.today()),
            "rows": [{**dataclasses.asdict(row), "ratio": row.ratio, "reached": row.reached} for row in rows],
        }
        options.json.write_text(json.dumps(written, indent=1))
