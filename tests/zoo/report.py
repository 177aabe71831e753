"""Coverage rows in, the coverage document out."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
import transformers

from tests.zoo.entries import FAMILIES, model_types

Row = dict[str, Any]
TARGETS = {"causal": 98, "masked": 98, "seq2seq": 95, "image": 97, "audio": 90}
"""Per cent of the models that eager PyTorch runs."""

FROZEN = 0.05
FAILED = {
    "build": "not built",
    "run": "not run by PyTorch",
    "trace": "not exportable",
    "groups": "error in analysis",
    "check": "error in cut",
    "stranger": "error from a directory",
}
HEAD = """# Coverage

Every model type of transformers' auto mappings in five families, as a small random model: built, run by eager PyTorch, traced, analysed;
then 30 % of each kind of group alone, of all exact groups, and of all groups together is cut at random.

    python -m tests.zoo --family all --checkpoint --report docs/coverage.md

**ok**: every exact cut equals the masked original in float64 (to 1e-8 of the largest output), every other cut runs, stays finite and has the
predicted number of parameters. **frozen**: the share of the parameters that lie on no group, of those the call uses and that are not over the
vocabulary; above {limit:.0%} the outcome is *ok, part frozen*, with the reasons below. **hidden only**: the share that only the width of the
residual stream can shrink. **unused**: the share that the example call does not touch (a decoder's cross attention, an image tower given no
image). **heads**: of the products between activations that have several heads, those in which heads, KV groups or queries of a group can go.
**checkpoint**: the model is saved, opened from its directory without inputs, and 30 % of what goes by default goes by magnitude, in memory
(beside the original, then with `inplace=True`), then with `--stream`. *stock*: `from_pretrained` alone loads the result; *record*: with the code
that lies beside it; *no*: refused, with the reason. *in place*, *streamed, too*: the same tensors; *beside*: a second model is made.
"""


WAYS = ("memory", "inplace", "stream")
"""The ways to prune a checkpoint, in a row."""


def outcome(row: Row) -> str:
    """What became of a model type, in a word."""
    error = row.get("error", "")
    if error.startswith(("timeout", "more than")):
        return "timeout" if error.startswith("timeout") else "out of memory"
    if error:
        return FAILED[row["stage"]]
    if row["wrong"]:
        return "wrong"
    return "ok" if row["frozen"] < FROZEN else "ok, part frozen"


def document(rows: Sequence[Row]) -> str:
    """The whole page."""
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"between {dates[0]} and {dates[-1]}"
    measured = f"Measured {when}, torch {torch.__version__}, transformers {transformers.__version__}. {revisions(rows)}\n"
    families = [(family, [row for row in rows if row["family"] == family]) for family in FAMILIES]
    parts = [HEAD.format(limit=FROZEN), measured, *summary(families), *checkpoints(families), *failures(rows), *frozen(rows)]
    return "\n".join([*parts, *(line for family, own in families if own for line in table(family, own))]) + "\n"


def revisions(rows: Sequence[Row]) -> str:
    """Which commit was measured; where not all rows are of one, which are of another."""
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        names[row.get("commit", "unknown")].append(f"{row['family']} {row['type']}")
    most, *others = sorted(names, key=lambda commit: -len(names[commit]))
    rest = "".join(f"; of `{commit}`: {', '.join(names[commit])}" for commit in others)
    return f"{'Rows' if others else 'All rows'} of commit `{most}`{rest}."


def summary(families: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[str]:
    yield "| family | types | built | PyTorch runs | ok | target | wrong | timeout | median frozen | median hidden only | outcomes |"
    yield "|" + "---|" * 11
    for family, rows in families:
        if rows:
            yield summary_line(family, rows)
    yield ""


def summary_line(family: str, rows: Sequence[Row]) -> str:
    found = Counter(outcome(row) for row in rows)
    types = len(model_types(family))
    built = len(rows) - found["not built"]
    runs = built - found["not run by PyTorch"]
    good = found["ok"] + found["ok, part frozen"]
    shares = [[row[name] for row in rows if name in row] or [0.0] for name in ("frozen", "hidden_only")]
    others = ", ".join(f"{count} {name}" for name, count in found.most_common())
    swept = f"{types}" if types == len(rows) else f"{len(rows)} of {types}"
    return (
        f"| {family} | {swept} | {built / len(rows):.1%} | {runs} | {good} ({good / max(1, runs):.1%}) | {TARGETS[family]} % "
        f"| {found['wrong']} | {found['timeout']} | {median(shares[0]):.2%} | {median(shares[1]):.2%} | {others} |"
    )


def checkpoint(row: Row) -> str:
    """What a compile of the saved model gives, in memory and streamed."""
    return ", ".join(row[name].replace("|", "or") for name in WAYS if name in row)


def checkpoints(families: Sequence[tuple[str, Sequence[Row]]]) -> Iterator[str]:
    """How many types of each family come out as what."""
    found = {family: Counter(_kind(row) for row in rows if "memory" in row) for family, rows in families}
    names = [name for name, _ in Counter(name for counts in found.values() for name in counts.elements()).most_common()]
    if names:
        yield from (f"| {' | '.join(['checkpoint', *names])} |", "|" + "---|" * (1 + len(names)))
        yield from (
            f"| {' | '.join([family, *(str(counts[name]) for name in names)])} |" for family, counts in found.items() if counts
        )
        yield ""


def _kind(row: Row) -> str:
    """Without the reasons."""
    return ", ".join(row[name].split(":")[0] for name in WAYS if name in row)


def failures(rows: Sequence[Row]) -> Iterator[str]:
    yield "## Every failure\n"
    bad = [row for row in rows if not outcome(row).startswith("ok")]
    for row in bad:
        yield f"- **{row['family']} {row['type']}**: {outcome(row)}. {'; '.join(row.get('wrong', [])) or without_home(row.get('error', ''))}"
    yield "" if bad else "None.\n"


def without_home(text: str) -> str:
    """Paths from the package on."""
    return re.sub(r"/\S*?/(?=transformers/|torch/|graphprune/)", "", text)


def frozen(rows: Sequence[Row]) -> Iterator[str]:
    yield f"## Frozen above {FROZEN:.0%}, or heads that stay\n"
    for row in rows:
        reasons, heads = row.get("reasons"), row.get("attention", [0, 0])
        if reasons and (row["frozen"] >= FROZEN or heads[0] < heads[1]):
            listed = "; ".join(f"{reason.replace('|', 'at').removesuffix(' at ')}" for reason in list(reasons)[:4])
            yield f"- **{row['family']} {row['type']}** (frozen {row['frozen']:.1%}, heads {heads[0]} of {heads[1]}): {listed}"
    yield ""


def table(family: str, rows: Sequence[Row]) -> Iterator[str]:
    yield f"## {family}\n"
    saved = any("memory" in row for row in rows)
    yield "| model type | outcome | groups | heads | frozen | hidden only | unused |" + (" checkpoint |" if saved else "")
    yield "|" + "---|" * (7 + saved)
    for row in rows:
        kinds = ", ".join(f"{kind} {count}" for kind, count in row.get("kinds", {}).items())
        heads = "{} of {}".format(*row["attention"]) if row.get("attention", [0, 0])[1] else ""
        shares = " | ".join(f"{row[name]:.1%}" if name in row else "" for name in ("frozen", "hidden_only", "unused"))
        yield f"| {row['type']} | {outcome(row)} | {kinds} | {heads} | {shares} |" + (f" {checkpoint(row)} |" if saved else "")
    yield ""
