"""The groups of real architectures and of hand-written nets are what the architecture says; the smaller model computes it.

Golden files in ``tests/golden`` hold every group in words; ``GOLDEN=write pytest tests/test_groups.py`` writes them anew.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphprune.axes import Keep
from graphprune.dependency import Join, Structure, closure, flows
from graphprune.difference import difference
from graphprune.errors import UserMistake
from graphprune.execute import tensors_of
from graphprune.groups import Group, Groups, couple
from graphprune.propagate import propagate
from graphprune.rewrite.graph import smaller
from graphprune.trace import trace
from graphprune.verify import masked_outputs, smaller_outputs
from tests import idioms  # noqa: F401  registers its nets
from tests.architectures import ARCHITECTURES, architecture
from tests.nets import NETS, example

GOLDEN = Path(__file__).parent / "golden"
MODELS = [*ARCHITECTURES, *NETS]

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes")


class Subject:
    """A model, its groups, and what it takes to run it."""

    def __init__(self, name: str) -> None:
        self.model, self.inputs = self._made(name)
        self.trace = trace(self.model, self.inputs)
        self.groups = couple(propagate(self.trace))
        self.tensors = tensors_of(self.model, self.trace)

    @staticmethod
    def _made(name: str) -> tuple[nn.Module, Any]:
        return architecture(name) if name in ARCHITECTURES else example(name)

    def gap(self, keep: Keep) -> float:
        """How far the smaller model is from the masked original."""
        axes, inputs = self.groups.axes, self.trace.flatten(self.inputs)
        return difference(smaller_outputs(axes, self.tensors, inputs, keep), masked_outputs(axes, self.tensors, inputs, keep))


@cache
def subject(name: str) -> Subject:
    """Each model is built and traced once."""
    return Subject(name)


# ── in words ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def described(groups: Groups) -> str:
    """Every group with its members and their axes, then everything frozen with the reason."""
    return "\n".join([*_groups(groups), "", "frozen", *_frozen(groups)]) + "\n"


def _groups(groups: Groups) -> Iterator[str]:
    for group in groups:
        least = f", at least {group.least}" if group.least > 1 else ""
        yield f"{group.name}   {group.size} units{'' if group.exact else ', renormalised'}{least}"
        yield from (f"    {member.role:<8}  {_place(groups, group, member.name, member.dim)}" for member in group.members)


def _place(groups: Groups, group: Group, name: str, dim: int) -> str:
    """``weight[0] = * · 2 · 4``: the axis, with the group's own factor as a star."""
    shown = str(groups.axes.tensors[name][dim]).replace(str(group.factor), "*")
    return f"{name}[{dim}]" + ("" if shown == "*" else f" = {_without_numbers(shown)}")


def _without_numbers(shown: str) -> str:
    """Factors by their size alone: their numbers change with every rule."""
    return " ".join(
        f"{'(' * word.count('(')}{word.strip('()').rpartition(':')[2]}{')' * word.count(')')}" for word in shown.split()
    )


def _frozen(groups: Groups) -> Iterator[str]:
    """One line a reason."""
    places: dict[str, list[str]] = defaultdict(list)
    for frozen in groups.frozen:
        places[frozen.reason.what] += [f"{member.name}[{member.dim}]" for member in frozen.members]
    for what, where in sorted(places.items()):
        yield f"    {what}: {', '.join(where[:4])}" + (f" and {len(where) - 4} more" if len(where) > 4 else "")


@pytest.mark.parametrize("name", MODELS)
def test_groups_are_what_the_architecture_says(name: str) -> None:
    found, path = described(subject(name).groups), GOLDEN / f"{name}.txt"
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(found)
    assert found == path.read_text()


# ── removal is exact ─────────────────────────────────────────────────────────────────────────────────────────────────


def survivors(groups: Groups, kind: str, seed: int = 0) -> Keep:
    """About 60 % of the units of every group of a kind, at random."""
    dice = random.Random(seed)
    chosen = [group for group in groups if group.kind == kind]
    return {g.factor: sorted(dice.sample(range(g.size), max(g.least, round(g.size * 0.6)))) for g in chosen}


@pytest.mark.parametrize("name", MODELS)
def test_the_smaller_model_is_the_masked_original(name: str) -> None:
    """Kind by kind in double precision; a cut that changes nothing at all would prove nothing, so it must also change something."""
    it = subject(name)
    for kind in it.groups.kinds:
        keep = survivors(it.groups, kind)
        exact = {group.factor: keep[group.factor] for group in it.groups if group.factor in keep and group.exact}
        assert it.gap(exact) < 1e-9, kind
        whole = masked_outputs(it.groups.axes, it.tensors, it.trace.flatten(it.inputs), {})
        found = smaller_outputs(it.groups.axes, it.tensors, it.trace.flatten(it.inputs), keep)
        assert 1e-6 < difference(found, whole) < float("inf"), kind


@pytest.mark.parametrize("name", MODELS)
def test_everything_at_once(name: str) -> None:
    it = subject(name)
    keep = {factor: units for kind in it.groups.kinds for factor, units in survivors(it.groups, kind, seed=1).items()}
    exact = {group.factor: keep[group.factor] for group in it.groups if group.exact}
    axes, inputs = it.groups.axes, it.trace.flatten(it.inputs)
    whole, found = masked_outputs(axes, it.tensors, inputs, {}), smaller_outputs(axes, it.tensors, inputs, keep)
    assert it.gap(exact) < 1e-9
    assert 1e-6 < difference(found, whole) < float("inf")
    cut = smaller(axes, it.tensors, keep).tensors
    for name, typed in axes.tensors.items():
        kept = [torch.tensor(axis.kept(keep)) for axis in typed]
        assert torch.equal(cut[name], it.tensors[name][torch.meshgrid(*kept, indexing="ij")] if kept else it.tensors[name]), name


# ── the degree rules ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", MODELS)
def test_the_degree_rules_never_leave_the_group_and_fill_it_where_nothing_adds(name: str) -> None:
    """Closure ⊆ index identity always; equal, from some trigger, where the flow has no additive join."""
    groups = subject(name).groups
    flow = flows(groups.graph)
    for group in groups:
        members = {Structure(member.name, member.dim) for member in group.members}
        own = flow.get(group.factor)
        if own is None:
            continue
        found = {vertex: {v for v in closure(own, vertex) if isinstance(v, Structure)} for vertex in own}
        assert all(reached <= members for reached in found.values()), group.name
        if not any(isinstance(vertex, Join) and not vertex.multiplicative for vertex in own):
            connected = members & set(own)
            assert any(reached == connected for reached in found.values()), group.name


# ── LLM-Pruner's figures, and the reasons ────────────────────────────────────────────────────────────────────────────


def members(name: str, kind: str) -> list[set[str]]:
    """What each group of a kind holds, weights only."""
    return [{str(m) for m in group.members if "weight" in m.name} for group in subject(name).groups if group.kind == kind]


def test_figure_of_the_mlp() -> None:
    assert members("GatedMLP", "ffn") == [{"gate.weight[0] produces", "up.weight[0] produces", "down.weight[1] consumes"}]


def test_figure_of_attention() -> None:
    """A head takes its rows of the three projections and its columns of the output projection."""
    projections = {f"{name}.weight[0] produces" for name in "qkv"}
    assert members("Heads", "head") == [{*projections, "o.weight[1] consumes"}]


def test_figure_of_channels() -> None:
    """One channel of the residual stream reaches every layer that reads or writes it, and the norm."""
    assert members("Channels", "hidden") == [
        {
            "embed.weight[0] produces",
            "norm.weight[0] carries",
            "up.weight[1] consumes",
            "down.weight[0] produces",
            "head.weight[1] consumes",
        }
    ]


def triggered(name: str, trigger: Structure) -> set[str]:
    """What the degree rules alone take with ``trigger``."""
    found = [closure(flow, trigger) for flow in flows(subject(name).groups.graph).values() if trigger in flow]
    return {str(vertex) for reached in found for vertex in reached if isinstance(vertex, Structure)}


def test_the_degree_rules_find_the_mlp_from_any_trigger() -> None:
    whole = {"gate.weight[0]", "gate.bias[0]", "up.weight[0]", "up.bias[0]", "down.weight[1]"}
    for trigger in (Structure("gate.weight", 0), Structure("up.weight", 0), Structure("down.weight", 1)):
        assert triggered("GatedMLP", trigger) == whole


def test_the_degree_rules_stop_where_branches_add() -> None:
    """A residual stream is joined by index identity, not by degrees: what one branch writes, the other still carries."""
    assert "down.weight[0]" not in triggered("Channels", Structure("embed.weight", 0))


def test_a_query_is_told_from_its_key_value_head() -> None:
    for name in ("llama", "phi3", "FusedGroups"):
        kinds = {group.kind: group for group in subject(name).groups}
        keyed = {str(m) for m in kinds["query"].members} < {str(m) for m in kinds["head"].members}
        assert keyed or kinds["query"].size != kinds["head"].size, name


def test_groups_are_found_by_name_and_by_pattern() -> None:
    groups = subject("GatedMLP").groups
    assert groups["gate:ffn"].size == 14
    assert (
        groups["gate:ffn"].touches(["up"]) and groups["gate:ffn"].touches(["*.bias"]) and not groups["gate:ffn"].touches(["other"])
    )
    with pytest.raises(KeyError):
        groups["nothing"]


def test_explain_prints_what_couples() -> None:
    text = subject("Channels").groups.explain("down.weight")
    assert "down.weight[0]" in text and "embed:hidden" in text and "up:ffn" in text
    assert "because these are one axis  [aten.add.Tensor]" in text
    assert "nets.py" in text and "x + self.down(" in text


def test_explain_prints_what_freezes() -> None:
    text = subject("Conflict").groups.explain("stem.weight")
    assert "cannot shrink" in text and "4 and 3 have no common layout" in text and "self.next(" in text
    assert "model input" in text


def test_explain_follows_aliases_and_offers_the_nearest_name() -> None:
    assert subject("Tied").groups.explain("decode.weight") == subject("Tied").groups.explain("encode.weight")
    with pytest.raises(UserMistake, match=r"stem\.weight"):
        subject("Conflict").groups.explain("stem.wieght")


class NormedInside(nn.Module):
    """A feed-forward layer whose gated inside is normalised before it is read, the norm written out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate, self.up, self.down, self.last = (
            nn.Linear(6, 10), nn.Linear(10, 24), nn.Linear(10, 24), nn.Linear(24, 10), nn.Linear(10, 3),
        )  # fmt: skip
        self.scale = nn.Parameter(torch.rand(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        inner = self.gate(x).relu() * self.up(x)
        inner = inner * torch.rsqrt(inner.pow(2).mean(-1, keepdim=True) + 1e-5) * self.scale
        return self.last(x + self.down(inner))


def test_a_norm_inside_a_gated_layer_does_not_make_it_a_stream() -> None:
    groups = couple(propagate(trace(NormedInside(), torch.randn(2, 6))))
    assert sorted((group.kind, group.size) for group in groups) == [("ffn", 24), ("hidden", 10)]
