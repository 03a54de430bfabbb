"""Studies: experiments as data. `NAME.toml` fixes a study, the module that its `kind` names knows how to run it.

`python -m biofunc experiment NAME` runs one. A module of studies has two functions: `jobs(study) -> list[Job]`, and
`check(study)`, which raises a ValueError of one line for whatever in the study cannot be run.
"""

import dataclasses
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

Results = dict[str, dict[str, dict[str, dict[str, list[Any]]]]]
"""{condition: {arm: {setting: {metric: [one float per seed, or a list of floats per seed (a curve)]}}}}"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A part of a study that runs as one vmapped ensemble; done or not done as a whole.

    Attributes:
        name: unique in its study; also the file name of its results.
        steps: ensemble steps, for the progress bar.
        run: `run(advance) -> results`; calls `advance(n)` after n steps.
    """

    name: str
    steps: int
    run: Callable[[Callable[[int], None]], Results]


def available() -> dict[str, pathlib.Path]:
    """The studies that biofunc brings: their TOML files by name."""
    return {path.stem: path for path in sorted(pathlib.Path(__file__).parent.glob("*.toml"))}


def module(kind: str) -> Any:
    """The module that runs studies of a kind.

    Raises:
        ValueError: there is no such kind.
    """
    folder = pathlib.Path(__file__).parent
    kinds = [path.stem for path in sorted(folder.glob("*.py")) if "\ndef jobs(study" in path.read_text()]
    if kind not in kinds:
        raise ValueError(f"kind is '{kind}'; it must be one of {', '.join(kinds)}")
    return importlib.import_module(f"biofunc.studies.{kind}")
