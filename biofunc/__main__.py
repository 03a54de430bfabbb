"""The command line: `python -m biofunc compare`, `python -m biofunc experiment NAME`; also as `biofunc compare`.

Started by torchrun, ranks share the work and rank 0 tells of it: `torchrun --nproc-per-node 2 -m biofunc compare`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from biofunc import __version__
from biofunc.torchrun import mesh_of_ranks, progress_bar, rank, tell

if TYPE_CHECKING:
    from biofunc.compare import Config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line and exit status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words behind the program's name; default: those of the process.

    Returns:
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _experiment(options) if options.command == "experiment" else _compare(options)
    except ModuleNotFoundError as error:
        extras = "demo,eval" if options.command == "experiment" else "demo"
        needs = f"; {options.command} needs: pip install '.[{extras}]' in the checkout"
        parser.error(f"{error}{'' if 'pip install' in str(error) else needs}")
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error).replace("\n", " "))
    except KeyboardInterrupt:
        if rank() == 0:
            print("\nbiofunc: interrupted; nothing was written", file=sys.stderr)
        return 130


def _parser() -> _Parser:
    parser = _Parser(prog="biofunc", description="Synapses for torch.func.")
    parser.add_argument("--version", action="version", version=f"biofunc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    compare = commands.add_parser(
        "compare",
        prog="biofunc compare",
        help="train bio-modified networks next to plain ones, as one ensemble, on real data",
    )
    compare.add_argument("--data", default="digits", help="digits (default), mnist5k or mnist1d")
    compare.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        help="fuzzy_learning_rates volume_dependent_lr crystallize rejuvenate_weights weight_splitting all_five, one "
        "or more, separated by spaces (default: all); plain always runs",
    )
    compare.add_argument("--seeds", type=int, default=32, help="members per arm (default: 32)")
    compare.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    compare.add_argument("--optimizer", default="sgd", help="sgd (default) or adam")
    compare.add_argument("--lr", type=float, help="learning rate (default: 0.1 for sgd, 0.001 for adam)")
    compare.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    compare.add_argument("--out", type=Path, help="folder (default: runs/DATA-OPTIMIZER-SEEDSxSTEPS)")
    experiment = commands.add_parser(
        "experiment",
        prog="biofunc experiment",
        help="run a study and report what it shows; goes on where it was stopped",
    )
    experiment.add_argument("study", help="a study of biofunc, or the path of a TOML file")
    experiment.add_argument("--out", type=Path, help="folder (default: runs/STUDY, runs/STUDY-quick)")
    experiment.add_argument("--seeds", type=int, help="seeds per arm (default: those of the study)")
    experiment.add_argument("--quick", action="store_true", help="few seeds and steps, to see that everything works")
    return parser


def _experiment(options: argparse.Namespace) -> int:
    from biofunc import experiment, random

    study = experiment.load(options.study, seeds=options.seeds, quick=options.quick)
    quick = "-quick" if options.quick else ""
    folder = _writable(options.out or Path("runs") / f"{study['name']}{quick}")
    experiment.check_folder(study, folder)
    tell(f"loading study {study['name']} …")  # imports, data and compiler take a while
    import matplotlib  # noqa: F401  # what is missing is said now, not when the results are there
    import scipy  # noqa: F401

    from biofunc.compare import compiler_works
    from biofunc.studies.analysis import analyse
    from biofunc.studies.pictures import pictures
    from biofunc.studies.report import report

    if compiler_works("cpu"):
        random.accelerate()
    jobs = experiment.jobs_of(study)
    already = experiment.done_in(study, jobs, folder)
    tell(f"study {study['name']}: {len(jobs)} jobs, {already} done")
    try:
        with mesh_of_ranks("cpu") as mesh:
            own = jobs if mesh is None else jobs[rank() :: mesh.size()]
            with progress_bar(sum([job.steps for job in own])) as bar:

                def advance(doing: str, steps: int) -> None:
                    bar.set_description(doing, refresh=steps == 0)
                    bar.update(steps)

                results, seconds = experiment.run(study, own, folder, advance, say=bar.write)
            if mesh is not None:
                dist.barrier()
                if rank() > 0:
                    return 0
                kept = experiment.done_in(study, jobs, folder)
                if kept < len(jobs):
                    raise ValueError(
                        f"only {kept} of {len(jobs)} jobs are in '{folder}' on rank 0; give --out a folder that all "
                        "machines share"
                    )
                results, seconds = experiment.run(study, jobs, folder, lambda doing, steps: None)
            meta = experiment.meta(seconds, _command(options))
            summary = {"study": study, "results": results, "analysis": analyse(study, results), "meta": meta}
            experiment.write(folder / "results.json", json.dumps(experiment.encode(summary), indent=1, allow_nan=False))
            text = report(summary)
            experiment.write(folder / "report.md", text)
            for name, picture in pictures(summary).items():
                experiment.write(folder / name, picture)
    except KeyboardInterrupt:
        if rank() == 0:
            kept = experiment.done_in(study, jobs, folder)
            done = f"{kept} of {len(jobs)} jobs are kept in '{folder}'"
            print(f"\nbiofunc: interrupted; {done}, and the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        kept = experiment.done_in(study, jobs, folder)
        raise ValueError(
            f"cannot write to '{folder}' ({error.strerror}); {kept} of {len(jobs)} jobs are kept there: make room, and "
            "give the same command again"
        ) from None
    print(text)
    print(f"{folder}/: report.md, results.json and pictures; {seconds:.0f} s in all")
    return 0


def _command(options: argparse.Namespace) -> str:
    seeds = "" if options.seeds is None else f" --seeds {options.seeds}"
    return f"python -m biofunc experiment {options.study}{seeds}{' --quick' if options.quick else ''}"


def _compare(options: argparse.Namespace) -> int:
    from biofunc import compare, datasets, report

    started = time.perf_counter()
    config = _config(options)
    data = datasets.load(config.data)
    default = f"{config.data}-{config.optimizer}-{config.seeds}x{config.steps}"
    folder = _writable(options.out or Path("runs") / default)
    groups = len({"weight_splitting" in compare.ARMS[arm] for arm in config.arms})
    with mesh_of_ranks(torch.device(config.device).type) as mesh:
        ranks = 1 if mesh is None else mesh.size()
        with progress_bar(groups * len(compare.chunks_of(config, mesh)) * config.steps) as bar:

            def advance(doing: str, steps: int) -> None:
                bar.set_description(doing, refresh=steps == 0)
                bar.update(steps)

            comparison = compare.compare(config, data, advance, mesh)
        if rank() > 0:
            return 0
        shared = f", shared by {ranks} ranks" if ranks > 1 else ""
        what = f"arms: {len(config.arms)}, seeds: {config.seeds}, steps: {config.steps}"
        print(f"{what}, by {comparison.execution}{shared}\n")
        summary = report.summarise(comparison)
        meta = report.meta(comparison, time.perf_counter() - started) | {"ranks": ranks}
        print(report.table(summary, meta["seconds_by_arm"]))
        print(f"\n{report.NOTE}")
        report.write(folder, summary, meta, comparison)
        print(f"\n{folder}/: results.json, curves.png, rates.png; {meta['seconds']:.0f} s in all")
    return 0


def _config(options: argparse.Namespace) -> "Config":
    from biofunc import compare

    for name in options.arms or ():
        if name not in compare.ARMS:
            raise ValueError(f"argument --arms: '{name}' is no arm; the arms are {', '.join(compare.ARMS)}")
    for name in ("seeds", "steps"):
        if getattr(options, name) < 1:
            raise ValueError(f"argument --{name}: {getattr(options, name)} is too few; give at least 1")
    if options.optimizer not in compare.LEARNING_RATES:
        raise ValueError(f"argument --optimizer: '{options.optimizer}' is unknown; give sgd or adam")
    lr = compare.LEARNING_RATES[options.optimizer] if options.lr is None else options.lr
    if not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"argument --lr: {lr} is no learning rate; give a positive number")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise ValueError(f"argument --device: '{options.device}' is unknown; give cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"argument --device: '{options.device}' is not supported; give cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("argument --device: cuda is not available here; give cpu")
    chosen = tuple([arm for arm in compare.ARMS if arm == "plain" or options.arms is None or arm in options.arms])
    return compare.Config(
        data=options.data,
        arms=chosen,
        seeds=options.seeds,
        steps=options.steps,
        optimizer=options.optimizer,
        lr=lr,
        device=str(device),
    )


def _writable(folder: Path) -> Path:
    """The folder, made if need be, and known to take files before any time is spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".biofunc"
        probe.touch()
        probe.unlink(missing_ok=True)  # another rank may have been faster
    except OSError as error:
        raise ValueError(f"argument --out: cannot write to '{folder}' ({error.strerror})") from None
    return folder


if __name__ == "__main__":
    sys.exit(main())
