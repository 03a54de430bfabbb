"""Runs every benchmark, one process after another, and writes what they print to docs/benchmarks.md."""

import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).parent
SCRIPTS = ("ensemble", "resnet", "step", "mechanisms", "draws", "compile_time")
TEXT = """# Benchmarks

`make bench` writes this page; close everything else meanwhile. Times are medians ± interquartile range, ours and the
rival's taken in turns in one process; "busy" is how many cores other processes used. The ratio is rival / biofunc where
it must reach ">=", else biofunc / rival. A missed target says so.
"""


def main() -> None:
    pages = [TEXT]
    for name in SCRIPTS:
        run = subprocess.run([sys.executable, str(HERE / f"{name}.py")], stdout=subprocess.PIPE, text=True, check=True)
        print(run.stdout, flush=True)
        pages.append(f"## {name}.py\n\n{run.stdout.strip()}\n")
    (HERE.parent.parent / "docs" / "benchmarks.md").write_text("\n".join(pages))


if __name__ == "__main__":
    main()
