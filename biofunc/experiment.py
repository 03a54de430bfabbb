"""Runs a study, keeps what is done, and writes what it shows: `python -m biofunc experiment NAME`.

A study is a TOML file, fixed before its first run. Its jobs are done one by one, and the results of each are kept in a
file of its own under a fingerprint of the study, so that a run that was stopped goes on where it was.
"""

import contextlib
import hashlib
import json
import math
import os
import platform
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from biofunc import __version__
from biofunc.studies import Job, Results, available, module

QUICK_SEEDS = 3

Say = Callable[[str], None]
Advance = Callable[[str, int], None]


def load(name: str, *, seeds: int | None = None, quick: bool = False) -> dict[str, Any]:
    """Reads a study and checks it.

    Args:
        name: of a study of biofunc, or the path of a TOML file.
        seeds: how many seeds, in place of those of the file.
        quick: whether the values under `[quick]` take the place of those of the same names; 3 seeds unless given.

    Returns:
        What the file holds, `name` and `quick` (a bool) added.

    Raises:
        ValueError: there is no such study, or something in it is missing or wrong; the message names file and remedy.
    """
    studies = available()
    path = studies.get(name, Path(name))
    if name not in studies and path.suffix != ".toml":
        raise ValueError(f"study '{name}' is unknown; give {', '.join(studies)}, or the path of a TOML file")
    try:
        study = tomllib.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"study '{name}': cannot read '{path}' ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"study '{name}': '{path}' is no TOML: {error}") from None
    overrides = study.pop("quick", {})
    if quick:
        study = _overridden(study, {"seeds": QUICK_SEEDS, **overrides})
    study |= {"name": path.stem, "quick": quick, **({} if seeds is None else {"seeds": seeds})}
    try:
        _check(study)
        module(study["kind"]).check(study)
    except KeyError as error:
        raise ValueError(f"study '{name}': '{path}' lacks {error}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"study '{name}': {error}") from None
    return study


def jobs_of(study: dict[str, Any]) -> list[Job]:
    """The jobs of a study from `load`.

    Raises:
        ValueError: two jobs of one name, or a name that is no file name.
    """
    jobs: list[Job] = module(study["kind"]).jobs(study)
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1 or "/" in name or not name:
            raise ValueError(f"study '{study['name']}': job '{name}' needs a name of its own, without '/'")
    return jobs


def fingerprint(study: Mapping[str, Any]) -> str:
    """Of all that a result depends on: the study as it is run, and the version of biofunc."""
    text = json.dumps([__version__, study], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run(
    study: Mapping[str, Any], jobs: Sequence[Job], folder: Path, advance: Advance, say: Say = print
) -> tuple[Results, float]:
    """Runs the jobs that have not been done.

    Args:
        study: from `load`.
        jobs: of the study, from `jobs_of`.
        folder: where results are kept, one file per job.
        advance: called with what is being done and the ensemble steps just finished, for a progress bar.
        say: called with a line about each file that cannot be used.

    Returns:
        The results of all jobs, and the seconds that they took, in this run and in earlier ones.

    Raises:
        OSError: results cannot be written; what was done before is kept.
    """
    mark = fingerprint(study)
    results: Results = {}
    seconds = 0.0
    for job in jobs:
        path = folder / f"{job.name}.json"
        done = _kept(path, mark, say)
        if done is None:
            advance(job.name, 0)
            started = time.perf_counter()
            found = job.run(lambda steps, name=job.name: advance(name, steps))  # type: ignore[misc]
            seconds_taken = time.perf_counter() - started
            done = {"study": study["name"], "fingerprint": mark, "seconds": seconds_taken, "results": found}
            write(path, json.dumps(encode(done), allow_nan=False))
        else:
            advance(job.name, job.steps)
        seconds += done["seconds"]
        _merge(results, done["results"], job.name)
    return results, seconds


def check_folder(study: Mapping[str, Any], folder: Path) -> None:
    """Refuses a folder with results of another study or of `compare`, which would be overwritten.

    Raises:
        ValueError: there are some; the message names the file.
    """
    for path in sorted(folder.glob("*.json"), key=lambda path: path.name != "results.json"):
        try:
            found = json.loads(path.read_bytes())
        except ValueError:  # damaged; the job will run anew
            continue
        if not isinstance(found, dict):
            continue
        compared = path.name == "results.json" and "arms" in found
        made_by = found.get("study", "biofunc compare" if compared else study["name"])
        name = made_by["name"] if isinstance(made_by, dict) else made_by
        if name != study["name"]:
            raise ValueError(f"argument --out: '{path}' holds results of '{name}'; give another folder")


def done_in(study: Mapping[str, Any], jobs: Sequence[Job], folder: Path) -> int:
    """How many jobs of a study are done in a folder.

    Args:
        study: from `load`.
        jobs: of the study, from `jobs_of`.
        folder: where results are kept.

    Returns:
        The number of jobs whose results this study made.
    """
    mark = fingerprint(study)
    return sum([_kept(folder / f"{job.name}.json", mark, None) is not None for job in jobs])


def meta(seconds: float, command: str) -> dict[str, Any]:
    """What may differ from run to run: time, machine, versions.

    Args:
        seconds: that all jobs took.
        command: that runs the study again.

    Returns:
        The entry "meta" of results.json.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": f"{platform.machine()} {platform.system()}",
        "versions": {"biofunc": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def write(path: Path, content: str | bytes) -> None:
    """Writes a file that is there as a whole or not at all, even if the machine stops."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def encode(value: Any) -> Any:
    """For strict JSON: numbers that are not finite become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, dict):
        return {str(name): encode(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, dict):
        return {name: decode(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [decode(inner) for inner in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _overridden(study: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(study)
    for name, value in overrides.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _overridden(merged[name], value) if both else value
    return merged


def _check(study: Mapping[str, Any]) -> None:
    for name in ("question", "kind"):
        if not isinstance(study[name], str):
            raise ValueError(f"{name} is {study[name]!r}; give a text")
    if isinstance(study["seeds"], bool) or not isinstance(study["seeds"], int) or study["seeds"] < 1:
        raise ValueError(f"seeds is {study['seeds']!r}; give a positive integer")
    decision = study["decision"]
    for name in ("metric", "control"):
        if not isinstance(decision[name], str):
            raise ValueError(f"[decision]: {name} is {decision[name]!r}; give a text")
    known = {"metric", "select", "control", "alpha", "smallest", "smaller_is_better", "select_smaller_is_better"}
    for name in decision:
        if name not in known:
            raise ValueError(f"[decision]: '{name}' is unknown; it may hold {', '.join(sorted(known))}")
    if not 0 < decision.get("alpha", 0.05) < 1:
        raise ValueError(f"[decision]: alpha is {decision['alpha']}; it lies in (0, 1)")
    if not decision.get("smallest", 0.0) >= 0:
        raise ValueError(f"[decision]: smallest is {decision['smallest']}; it is at least 0")


def _kept(path: Path, mark: str, say: Say | None) -> dict[str, Any] | None:
    """The results in a file, if they are whole and of this study; a file that is not is set aside and reported."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        found = decode(json.loads(text))
        whole = isinstance(found["results"], dict) and isinstance(found["seconds"], (int, float))
        own = found["fingerprint"] == mark
    except (ValueError, KeyError, TypeError):
        whole = own = False
    if whole and own:
        result: dict[str, Any] = found
        return result
    if say is not None:
        aside = next(p for i in range(1, 10**6) if not (p := path.with_name(f"{path.name}.aside{i}")).exists())
        path.replace(aside)
        why = "was made by another study, seeds or version" if whole else "is damaged"
        say(f"'{path}' {why}; it is set aside as '{aside.name}', and the job runs anew")
    return None


def _merge(into: dict[str, Any], new: Mapping[str, Any], job: str) -> None:
    for name, value in new.items():
        if not isinstance(value, dict):
            if name in into:
                raise ValueError(f"job '{job}' gives '{name}' a second time, for the same condition, arm and setting")
            into[name] = value
        else:
            _merge(into.setdefault(name, {}), value, job)
