"""Arms of the study of classification, and the groups of them that are trained as one ensemble."""

import dataclasses
import itertools
import math
from typing import Any

OFF: dict[str, float] = {
    "nu": 0.0,
    "stability_factor": 0.0,
    "lr_variability": 0.0,
    "dampening_factor": 1.0,
    "dre": math.inf,
    "random_dre": math.inf,
    "gamma": 1,
    "width": 1.0,
}
"""What an arm may set, and the value at which nothing happens. `random_dre` is `dre` of the control that re-draws any
synapse, not the weak ones, at the same turnover; `width` is the share of the hidden units that is kept."""

SHAPES_DIRECTION = ("nu", "stability_factor", "lr_variability", "dampening_factor")
"""Settings that matter differently before and behind an optimizer."""

Arm = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Group:
    """Arms that are trained as one ensemble: one data set, optimizer, phase and forward pass."""

    study: dict[str, Any]
    data: str
    optimizer: str
    phase: str
    gamma: int
    hidden: int
    arms: tuple[str, ...]

    @property
    def name(self) -> str:
        """What tells it from the others."""
        network = f"split {self.gamma}" if self.gamma > 1 else f"{self.hidden} hidden"
        return f"{self.data} {self.optimizer} {self.phase} {network}"

    @property
    def rates(self) -> list[float]:
        """The learning rates that are tried."""
        rates: list[float] = self.study["optimizers"][self.optimizer]["lr"]
        return rates

    @property
    def task(self) -> dict[str, Any]:
        """The settings of the data set."""
        task: dict[str, Any] = self.study["data"][self.data]
        return task

    @property
    def members(self) -> int:
        """Arm by arm, rate by rate, seed by seed."""
        return len(self.arms) * len(self.rates) * int(self.study["seeds"])


def arms(study: dict[str, Any]) -> dict[str, Arm]:
    """The arms of a study with all their settings: its `[arms]`, or every subset of its `[factors]`.

    An arm of factors is called by their names, "crystallize + weight_splitting"; the one without any is "plain".
    """
    factors = study.get("factors", {})
    subsets = [chosen for n in range(len(factors) + 1) for chosen in itertools.combinations(factors, n)]
    combined = {
        " + ".join(chosen) or "plain": {k: v for name in chosen for k, v in factors[name].items()} for chosen in subsets
    }
    given = study["arms"] if not factors else combined
    return {name: {**OFF, **settings} for name, settings in given.items()}


def groups(study: dict[str, Any]) -> list[Group]:
    """What is trained together. Arms that no phase changes are trained in the first phase only."""
    made = []
    for data, optimizer in itertools.product(study["data"], study["optimizers"]):
        for phase in _phases(study, optimizer):
            networks: dict[tuple[int, int], list[str]] = {}
            for name, arm in arms(study).items():
                if phase == study["phases"][0] or _depends_on_phase(arm):
                    network = int(arm["gamma"]), int(study["data"][data]["hidden"] * arm["width"])
                    networks.setdefault(network, []).append(name)
            for (gamma, hidden), chosen in networks.items():
                made.append(Group(study, data, optimizer, phase, gamma, hidden, tuple(chosen)))
    return made


def _phases(study: dict[str, Any], optimizer: str) -> list[str]:
    phases: list[str] = study["phases"]
    return phases[:1] if optimizer == "sgd" else phases  # nothing stands between gradient and update


def _depends_on_phase(arm: Arm) -> bool:
    return any([arm[setting] != OFF[setting] for setting in SHAPES_DIRECTION])


def conditions(group: Group, arm: str) -> list[str]:
    """The conditions to which an arm of a group belongs.

    Args:
        group: in which it is trained.
        arm: its name.

    Returns:
        Names of conditions; both phases for an arm that no phase changes.
    """
    phases = _phases(group.study, group.optimizer)
    if len(phases) == 1:
        return [f"{group.data}, {group.optimizer}"]
    shared = not _depends_on_phase(arms(group.study)[arm])
    return [f"{group.data}, {group.optimizer}, {p} phase" for p in (phases if shared else [group.phase])]
