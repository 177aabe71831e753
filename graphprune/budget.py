"""A person's wishes in, a Budget out: what may stay, of which kinds, in which multiples."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real

from graphprune.cost import MEASURES
from graphprune.errors import UserMistake, nearest
from graphprune.groups import KINDS, Group, Groups
from graphprune.pieces import WHOLE

WIDE = {4096: 64, 512: 16}
"""What kept FFN widths are multiples of unless a budget says otherwise, by the least width it is for."""

NUMBERED = ("head", "query", "expert")
"""Kinds whose units are parts of a model that are counted, not the places of a width."""

ALIASES = {"attention": ("head",), "heads": ("head",), "width": ("hidden",), "all": KINDS}


@dataclass(frozen=True, slots=True)
class Budget:
    """How much may stay, and under which rules.

    ``keep`` is a share of the parameters of the groups of the allowed kinds, or of the whole ``model``. ``target`` takes its place:
    shares of the whole model's ``parameters``, ``bytes`` of weights, ``flops``, ``kv`` (bytes of cached keys and values) or
    ``latency`` (measured on this machine, of a forward of the traced sizes) that may stay, all of them. ``kinds`` None means
    attention heads and FFN channels where there is attention, everything otherwise. ``round_to`` makes kept sizes multiples,
    and leaves alone what has no multiple that is smaller (a number for all kinds says nothing of fewer heads or experts); a kind it
    does not name gets what hardware likes, ``WIDE``, as long as that does not put the budget out of reach. ``minimum``
    bounds sizes below, ``alike`` makes equal layers shrink alike, ``together`` further layers, each set by a group of every kind
    of layer in it, ``protect`` names (globs, modules, tensors, groups) what must not change.
    """

    keep: float = 0.8
    keep_of: str = "groups"
    scope: str = "local"
    kinds: Sequence[str] | None = None
    protect: Sequence[str] = ()
    round_to: int | Mapping[str, int] | None = None
    minimum: int | Mapping[str, int] = 1
    alike: bool = False
    target: Mapping[str, float] = field(default_factory=dict)
    together: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        for name, listed in (("kinds", self.kinds), ("protect", self.protect)):
            if isinstance(listed, str):
                raise UserMistake(f"{name} is a text, {listed!r}", fix=f"{name}=[{listed!r}]")
            if strangers := [entry for entry in listed or () if not isinstance(entry, str)]:
                raise UserMistake(f"{name} holds a {type(strangers[0]).__name__}", fix="give names")
        if not isinstance(self.target, Mapping):
            raise UserMistake(f"target is a {type(self.target).__name__}", fix='target={"parameters": 0.5}')
        if not _is_share(self.keep):
            raise UserMistake(f"keep must be above 0 and at most 1, not {self.keep}", fix="0.8 keeps 80 %")
        scopes = ("local", "global", "rank")
        for name, value, choices in (("keep_of", self.keep_of, ("groups", "model")), ("scope", self.scope, scopes)):
            if value not in choices:
                raise UserMistake(f"{name} cannot be {value!r}", fix=nearest(value, choices))
        for name, setting in (("round_to", self.round_to), ("minimum", self.minimum)):
            by_kind = setting if isinstance(setting, Mapping) else {KINDS[0]: 1 if setting is None else setting}
            for kind, units in by_kind.items():
                if kind not in (*KINDS, *WHOLE):
                    raise UserMistake(f"{name}: no kind of group is called {kind!r}", fix=nearest(kind, (*KINDS, *WHOLE)))
                if not isinstance(units, Integral) or units < 1:
                    raise UserMistake(f"{name} cannot be {units}", fix="give a positive number of units")
        for name, share in self.target.items():
            if name not in MEASURES:
                raise UserMistake(f"no budget is called {name!r}", fix=nearest(name, MEASURES))
            if not _is_share(share):
                raise UserMistake(f"a target of {name} must be above 0 and at most 1, not {share}", fix=f"{name}=0.8 keeps 80 %")

    def multiple(self, group: Group) -> int:
        """What kept sizes of a group are multiples of."""
        if isinstance(self.round_to, int) or group.kind in (self.round_to or {}) or group.kind != "ffn":
            return self.asked(group.kind, group.size)
        return next((multiple for least, multiple in WIDE.items() if group.size >= least), 1)

    def asked(self, kind: str, size: int) -> int:
        """What kept sizes of a kind are to be multiples of by ``round_to`` alone, of so many units."""
        named = for_kind(self.round_to, kind)
        return 1 if isinstance(self.round_to, int) and kind in NUMBERED and named >= size else named

    def as_asked(self, kinds: Iterable[str]) -> Budget:
        """The same for these kinds with no rounding but what was asked for."""
        asked = isinstance(self.round_to, int)
        return self if asked else replace(self, round_to={kind: for_kind(self.round_to, kind) for kind in kinds})


def allowed_kinds(groups: Groups, kinds: Sequence[str] | None) -> tuple[str, ...]:
    """The kinds a budget ranges over. Raises UserMistake on a kind this model lacks."""
    present = groups.kinds
    if kinds is None:
        return _unasked(groups)
    asked = [kind for name in kinds for kind in ALIASES.get(name, (name,))]
    for kind in asked:
        if kind not in KINDS:
            raise UserMistake(f"no kind of group is called {kind!r}", fix=nearest(kind, [*KINDS, *ALIASES]))
    if not set(asked) & set(present):
        raise UserMistake(f"this model has no prunable {' or '.join(asked)}", fix=f"it has {', '.join(present) or 'none'}")
    return tuple(dict.fromkeys(kind for kind in asked if kind in present))


def _unasked(groups: Groups) -> tuple[str, ...]:
    """All kinds; with attention heads and FFN channels, and channels of convolutions that hold more weights than those."""
    if "head" not in groups.kinds:
        return tuple(groups.kinds)
    kinds = [kind for kind in ("head", "ffn") if kind in groups.kinds]
    return tuple([*kinds, "channel"] if _weights(groups, ["channel"]) > _weights(groups, kinds) else kinds)


def _weights(groups: Groups, kinds: Collection[str]) -> int:
    """Parameters with a dimension in a group of these kinds."""
    names = {member.name for group in groups if group.kind in kinds for member in group.members}
    return groups.axes.trace.count(names)


def for_kind(setting: int | Mapping[str, int] | None, kind: str) -> int:
    """A setting given once for all kinds or kind by kind; 1 where it is not given."""
    return setting if isinstance(setting, int) else int((setting or {}).get(kind, 1))


def _is_share(value: object) -> bool:
    return isinstance(value, Real) and bool(0 < float(value) <= 1)
