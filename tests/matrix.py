"""Runs the suite on the oldest and on the newest torch and optree that install here, and writes docs/matrix.md.

    python3 tests/matrix.py [--rows oldest newest] [--quick | --tests FILE … | --again] [--workers 2]

"oldest" takes the lower bounds of pyproject.toml on the oldest Python that it allows, "newest" what pip finds without
bounds on the newest Python of this machine. Everything else is pinned by constraints.txt. The environments lie in
.matrix, about 6 GB each where torch comes with CUDA, and are used again. The page shows the last run of each row;
`--again` runs what failed in it once more, after a change, and counts it anew.
"""

import argparse
import datetime
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import tomllib
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / ".matrix"
ROWS = ("oldest", "newest")
WHOLE, QUICK = "whole suite", "tests/test_laws.py"
# What a Python must have: venv's pip, and headers, without which torch compiles nothing
PROBE = "import ensurepip, os, platform, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h'); "
VERSIONS = """
import importlib.metadata, json
print(json.dumps({name: importlib.metadata.version(name) for name in ("torch", "optree", "numpy")}))
"""
TEXT = """# Versions

`make matrix` runs the suite in environments of its own and writes this page: "oldest" has the lower bounds of
`pyproject.toml`, "newest" what the package index offers; the other packages are those of `constraints.txt`. `make test`
runs the suite on the versions of `constraints.txt`. "again" counts tests that failed at first and ran once more after a
change; the rest ran before it.
"""


def lower_bounds() -> dict[str, str]:
    """Lower bounds of pyproject.toml by name, Python's included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [f"python{project['requires-python']}", *project["dependencies"]]
    return dict(need.split(">=") for need in needs)


def pythons() -> dict[str, str]:
    """Usable Pythons of this machine in ascending order, path by version: those of PATH, then those of pyenv."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    least = int(lower_bounds()["python"].split(".")[1])
    found = {}
    for minor in range(least, least + 20):
        name = f"python3.{minor}"
        for path in filter(None, (shutil.which(name), *sorted(pyenv.glob(f"versions/*/bin/{name}")))):
            command = [path, "-c", PROBE + "print(platform.python_version())"]
            probe = subprocess.run(command, capture_output=True, text=True)
            if probe.returncode == 0:
                found[probe.stdout.strip()] = str(path)
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in re.findall(r"\d+", item[0])]))


def pins() -> list[str]:
    """The lines of constraints.txt that say nothing of torch and optree."""
    free = re.compile(rf"({'|'.join(lower_bounds())})==", re.IGNORECASE)
    return [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not free.match(line)]


def environment(row: str, python: str, version: str) -> pathlib.Path:
    """The row's Python, with everything installed."""
    folder = FOLDER / f"{row}-{version}"
    if not (folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
    (folder / "constraints.txt").write_text("\n".join(pins()) + "\n")
    bounds = {name: bound for name, bound in lower_bounds().items() if name != "python"}
    wanted = [f"{name}=={bound}" if row == "oldest" else name for name, bound in bounds.items()]
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--upgrade", "--no-cache-dir"]
    command += ["-c", str(folder / "constraints.txt"), "-e", ".[test]", *wanted]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


def run_suite(row: str, python: str, version: str, tests: list[str], workers: int) -> dict[str, object]:
    """Counts of one run; pytest's own output shows the progress."""
    print(f"\n== {row}: Python {version}, {' '.join(tests) or WHOLE}", flush=True)
    result = {"row": row, "python": version, "tests": " ".join(tests) or WHOLE, "date": str(datetime.date.today())}
    try:
        folder = environment(row, python, version)
    except subprocess.CalledProcessError as error:
        return result | {"broken": f"does not install: {' '.join(error.cmd[1:4])} ended with {error.returncode}"}
    executable, report = str(folder / "bin" / "python"), folder / "report.xml"
    report.unlink(missing_ok=True)
    result |= json.loads(subprocess.run([executable, "-c", VERSIONS], capture_output=True, check=True).stdout)
    # The checkout is installed; a PYTHONPATH would put other packages before those of the row
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    command = [executable, "-m", "pytest", "-n", str(workers), "-rfE", f"--junitxml={report}", *tests]
    code = subprocess.run(command, cwd=ROOT, env=variables).returncode
    result["seconds"] = round(time.perf_counter() - start)
    if not report.exists() or code not in (0, 1):
        return result | {"broken": f"pytest ended with {code}"}
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    result |= {"passed": len(cases) - len(bad) - skipped, "failed": len(bad), "skipped": skipped}
    names = [f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}" for case in bad]
    return result | {"failures": names}


def joined(before: dict[str, object], again: dict[str, object]) -> dict[str, object]:
    """A run of which the failures ran again; as it was, if they did not run on the same versions."""
    if "broken" in again or any([again[name] != before[name] for name in ("python", "torch", "optree", "numpy")]):
        return before
    return before | {
        "passed": before["passed"] + again["passed"],
        "failed": again["failed"],
        "skipped": before["skipped"] + again["skipped"],
        "again": before.get("again", 0) + before["failed"],
        "failures": again["failures"],
        "seconds": before["seconds"] + again["seconds"],
    }


def proof(name: str, bound: str, results: list[dict[str, object]]) -> str:
    """What the runs say of one lower bound."""
    ran = [one for one in results if re.match(rf"{re.escape(bound)}(?![0-9])", str(one.get(name)))]
    for one in ran:
        if one["tests"] == WHOLE and one.get("failed") == 0:
            return f"- {name}>={bound}: proven by the row {one['row']} ({name} {one[name]})."
    why = [f"{one['row']}: {shortfall(one)}" for one in ran]
    return f"- {name}>={bound}: not proven; {'; '.join(why) or 'no row ran with it'}."


def shortfall(one: dict[str, object]) -> str:
    """Why a run proves nothing."""
    if "broken" in one:
        return str(one["broken"])
    return f"{one['failed']} failed" if one["failed"] else f"{one['tests']} alone"


def page(results: list[dict[str, object]], found: dict[str, str]) -> str:
    heads = (
        "row",
        "python",
        "torch",
        "optree",
        "numpy",
        "tests",
        "passed",
        "failed",
        "skipped",
        "again",
        "seconds",
        "date",
    )
    lines = [TEXT, f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join([str(one.get(head, '-')) for head in heads])} |" for one in results]
    lines += [f"\nRow {one['row']}: {one['broken']}." for one in results if "broken" in one]
    lines += ["", *[proof(name, bound, results) for name, bound in lower_bounds().items()]]
    lines += ["", f"Pythons on this machine: {', '.join(found)}."]
    for one in results:
        if one.get("failures"):
            lines += [f"\nFailed in the row {one['row']}:\n", *[f"- `{name}`" for name in one["failures"]]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=ROWS, help="none: only write the page again")
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--quick", action="store_true", help="only the laws")
    some.add_argument("--tests", nargs="+", default=[], metavar="FILE")
    some.add_argument("--again", action="store_true", help="only what failed in the last run")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest-xdist")
    options = parser.parse_args()
    found = pythons()
    if not found:
        sys.exit(f"no Python {lower_bounds()['python']} or newer with pip and headers on PATH or in pyenv; install one")
    FOLDER.mkdir(exist_ok=True)
    chosen = {"oldest": next(iter(found)), "newest": next(reversed(found))}
    for row in options.rows:
        kept = FOLDER / f"{row}.json"
        before = json.loads(kept.read_text()) if options.again and kept.exists() else {}
        if options.again and not before.get("failures"):
            print(f"{row}: nothing failed in the last run")
            continue
        tests = before["failures"] if options.again else [QUICK] if options.quick else options.tests
        result = run_suite(row, found[chosen[row]], chosen[row], tests, options.workers)
        kept.write_text(json.dumps(joined(before, result) if options.again else result, indent=1))
    results = [json.loads((FOLDER / f"{row}.json").read_text()) for row in ROWS if (FOLDER / f"{row}.json").exists()]
    text = page(results, found)
    (ROOT / "docs" / "matrix.md").write_text(text)
    print(f"\n{text}")
    return int(any([one.get("failed") != 0 for one in results]))


if __name__ == "__main__":
    sys.exit(main())
