"""Sweep models of other libraries, each pruned in a process of its own: ``python -m tests.zoo.libraries timm --jobs 2 [--only …]``.

timm, torchvision and whatever they need are not among the project's requirements: install them beside it. Of each of timm's
modules the smallest model is taken, of torchvision's families all; weights are random, inputs are images of the size it was made for.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphprune
from graphprune.errors import ModelLimit
from tests.zoo.__main__ import read, revision, write
from tests.zoo.apart import Limits, Row, apart

KEEP = 0.7


def timm_names() -> list[str]:
    """The smallest model of each module, by what it holds."""
    import timm  # noqa: PLC0415

    return sorted({min(timm.list_models(module=module), key=_size) for module in timm.list_modules() if timm.list_models(module=module)})


def _size(name: str) -> int:
    import timm  # noqa: PLC0415

    try:
        with torch.device("meta"):
            return sum(p.numel() for p in timm.create_model(name).parameters())
    except Exception:  # some compute with numbers while they are built
        return 1 << 40


def torchvision_names() -> list[str]:
    import torchvision  # noqa: PLC0415

    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def built(library: str, name: str) -> tuple[nn.Module, Tensor]:
    """The model with random weights, and an image."""
    torch.manual_seed(0)
    if library == "timm":
        import timm  # noqa: PLC0415

        model = timm.create_model(name)
        return model.eval(), torch.randn(1, *model.default_cfg["input_size"])
    import torchvision  # noqa: PLC0415

    extra: dict[str, Any] = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    size = 299 if name == "inception_v3" else 224
    return torchvision.models.get_model(name, **extra).eval(), torch.randn(1, 3, size, size)


NAMES = {"timm": timm_names, "torchvision": torchvision_names}


def pruned(library: str, name: str) -> Iterator[Row]:
    """What is known after each step: of the parameters that go by default 30 % go by magnitude, else in a graph."""
    warnings.simplefilter("ignore")
    model, image = built(library, name)
    count = sum(p.numel() for p in model.parameters())
    yield {"stage": "compile", "class": type(model).__name__, "parameters": count}
    took: dict[str, float] = {}
    last = [time.monotonic(), ""]

    def clocked(stage: str) -> None:
        now = time.monotonic()
        took[str(last[1])] = round(took.get(str(last[1]), 0) + now - float(last[0]), 1)
        last[:] = [now, stage]

    try:
        found = graphprune.compile(model, image, keep=KEEP, method="magnitude", progress=clocked)
        row: Row = {"emit": "module"}
    except ModelLimit as limit:
        yield {"refused": "; ".join(part for part in (limit.what, limit.at, limit.why) if part)[:400]}
        found = graphprune.compile(model, image, keep=KEEP, method="magnitude", emit="graph", progress=clocked)
        row = {"emit": "graph"}
    clocked("")
    left = found.plan.cost["after"]["parameters"] / found.plan.cost["before"]["parameters"]
    kinds: dict[str, int] = {}
    for cut in found.plan.cuts:
        kinds[cut.kind] = kinds.get(cut.kind, 0) + 1
    yield row | {"left": round(left, 3), "kinds": kinds, "notes": list(found.notes), "took": took, "stage": "done"}


def main() -> None:
    options = arguments()
    names = options.only or NAMES[options.library]()
    measured = {"commit": revision()}
    for row in apart(pruned, [(options.library, name) for name in names], options.jobs, Limits(options.seconds, options.gigabytes << 30)):
        row.pop("at", None)
        rows = read(options.rows) | {(row["family"], row["type"]): row | measured}
        print(shown(row), flush=True)
        write(options.rows, rows)


def shown(row: Row) -> str:
    what = row.get("error") or row.get("refused") or " ".join(row.get("notes", []))
    left = f"{row['left']:.2f}" if "left" in row else "    "
    slow = {stage: seconds for stage, seconds in row.get("took", {}).items() if seconds >= 1}
    return f"{row['family']:12} {row['type']:28} {row.get('emit', 'NO'):6} {left} {row['seconds']:6.1f} s {slow} {what[:300]}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo.libraries", description=__doc__)
    parser.add_argument("library", choices=NAMES)
    parser.add_argument("--only", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=240, help="limit for one model")
    parser.add_argument("--gigabytes", type=int, default=8, help="limit for one model")
    parser.add_argument("--rows", type=Path, default=Path("docs/libraries.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
