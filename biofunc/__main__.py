"""The command line: `python -m biofunc compare`, or `biofunc compare`."""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch

from biofunc import __version__

if TYPE_CHECKING:
    from tqdm import tqdm

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
        return _compare(options)
    except ModuleNotFoundError as error:
        hint = "" if "pip install" in str(error) else "; compare needs: pip install '.[demo]' in the checkout"
        parser.error(f"{error}{hint}")
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error).replace("\n", " "))
    except KeyboardInterrupt:
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
    return parser


def _compare(options: argparse.Namespace) -> int:
    from biofunc import compare, datasets, report

    started = time.perf_counter()
    config = _config(options)
    data = datasets.load(config.data)
    default = f"{config.data}-{config.optimizer}-{config.seeds}x{config.steps}"
    folder = _writable(options.out or Path("runs") / default)
    groups = len({"weight_splitting" in compare.ARMS[arm] for arm in config.arms})
    with _progress_bar(groups * config.steps) as bar:

        def advance(doing: str, steps: int) -> None:
            bar.set_description(doing, refresh=steps == 0)
            bar.update(steps)

        comparison = compare.compare(config, data, advance)
    print(f"arms: {len(config.arms)}, seeds: {config.seeds}, steps: {config.steps}, by {comparison.execution}\n")
    summary = report.summarise(comparison)
    meta = report.meta(comparison, time.perf_counter() - started)
    print(report.table(summary, meta["seconds_by_arm"]))
    print(f"\n{report.NOTE}")
    report.write(folder, summary, meta, comparison)
    print(f"\n{folder}/: results.json, curves.png, rates.png; {meta['seconds']:.0f} s in all")
    return 0


def _progress_bar(total: int) -> "tqdm":
    from tqdm import tqdm

    return tqdm(total=total, unit="step")


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
        probe.unlink()
    except OSError as error:
        raise ValueError(f"argument --out: cannot write to '{folder}' ({error.strerror})") from None
    return folder


if __name__ == "__main__":
    sys.exit(main())
