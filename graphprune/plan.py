"""The plan: which units of which groups survive, as plain data that a person can read, diff and replay."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from graphprune.axes import Factor
from graphprune.errors import UserMistake
from graphprune.groups import Groups
from graphprune.runs import runs
from graphprune.trace import Trace

SCHEMA = 1
PLAN = "graphprune_plan.json"
"""Its name in a checkpoint."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What happens to one group: its surviving units, and what the scores of kept and removed units look like."""

    group: str
    kind: str
    size: int
    kept: tuple[int, ...]
    members: tuple[str, ...]
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """A pruned shape of one model: only groups that shrink are listed. ``cost`` has ``before`` and ``after``."""

    model: str
    fingerprint: str
    method: str
    options: Mapping[str, Any]
    cuts: tuple[Cut, ...]
    cost: Mapping[str, Mapping[str, float]]

    def keep(self, groups: Groups) -> dict[Factor, Sequence[int]]:
        """The surviving units by factor, on the groups of the model the plan is applied to. Raises UserMistake on a stranger."""
        self.check(groups)
        found = {group.name: group for group in groups}
        if twice := [name for name, count in Counter(cut.group for cut in self.cuts).items() if count > 1]:
            raise UserMistake(f"the plan cuts {twice[0]} twice")
        for cut in self.cuts:
            group = found.get(cut.group)
            if group is None or group.size != cut.size:
                what = "there is no such group" if group is None else f"it has {group.size} units, {cut.size} in the plan"
                raise UserMistake(f"the plan does not fit {cut.group}", why=what, fix="apply it to the model it was made for")
            if cut.kind != group.kind:
                raise UserMistake(f"the plan does not fit {cut.group}", why=f"it is of kind {group.kind}, {cut.kind} in the plan")
            if cut.kept and len(cut.kept) < group.least:
                raise UserMistake(f"{cut.group} cannot keep {len(cut.kept)} units", why=f"the model needs {group.least} of them")
            if not cut.kept or list(cut.kept) != sorted(set(cut.kept)) or not 0 <= cut.kept[0] <= cut.kept[-1] < cut.size:
                raise UserMistake(f"the plan keeps no units 0 to {cut.size - 1} of {cut.group} in order", why=_ranges(cut.kept))
        return {found[cut.group].factor: cut.kept for cut in self.cuts}

    def check(self, groups: Groups) -> None:
        """Raise UserMistake when the plan was made for a model of other names or shapes."""
        if self.fingerprint != fingerprint(groups.axes.trace):
            raise UserMistake(
                f"this plan was made for another model ({self.model})",
                why="parameter names or shapes differ",
                fix="apply it to that model or to a checkpoint of the same architecture and sizes",
            )

    def dumps(self) -> str:
        """The plan as JSON, kept units as ranges: ``0-3,7``."""
        body = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        body["cuts"] = [{e.name: getattr(cut, e.name) for e in fields(cut)} | {"kept": _ranges(cut.kept)} for cut in self.cuts]
        return json.dumps({"schema": SCHEMA, **body}, indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the plan; the file appears complete or not at all."""
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(self.dumps())
        part.replace(target)


def load_plan(path: str | Path) -> Plan:
    """Read a plan, or that in a directory which a compile wrote.

    Raises UserMistake when the file is missing, broken or of another schema.
    """
    path = Path(path) / PLAN if Path(path).is_dir() else Path(path)
    try:
        body = json.loads(path.read_text())
        if body.pop("schema") != SCHEMA:
            raise UserMistake(f"{path} has another plan schema than this graphprune reads ({SCHEMA})")
        cuts = tuple(Cut(**{**c, "kept": _units(c["kept"]), "members": tuple(c["members"])}) for c in body.pop("cuts"))
        return Plan(cuts=cuts, **body)
    except FileNotFoundError as error:
        raise UserMistake(f"there is no plan at {path}") from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserMistake(f"{path} is not a graphprune plan", why=str(error)) from error


def fingerprint(trace: Trace) -> str:
    """What two checkpoints of one architecture share: names, shapes and ties of all parameters and buffers."""
    rows = sorted({(tensor.names, tensor.shape) for tensor in trace.tensors.values()})
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def _ranges(units: Sequence[int]) -> str:
    return ",".join(str(first) if count == 1 else f"{first}-{first + count - 1}" for first, count in runs(units))


def _units(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for part in text.split(","):
        first, *last = map(int, part.split("-"))
        if len(last) > 1 or last < [first] * len(last):
            raise ValueError(f"no range of units: {part!r}")
        found += range(first, (last or [first])[0] + 1)
    return tuple(found)
