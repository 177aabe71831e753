"""graphprune and torch-pruning side by side: from a model to the same model pruned by the same share, time and memory.

    pip install --no-deps --target /tmp/peers torch-pruning
    PYTHONPATH=/tmp/peers python benchmarks/peers.py [--pairs 3] [--limit 120] [--plot peers.png] [NETWORK ...]

Each run is a process of its own on one thread that imports everything first and prunes a two-layer toy to warm up; then the
network of ``networks.py`` is built, garbage is collected, and the clock runs from the model to the pruned model. Runs come in
pairs, one after the other; ratios are medians over pairs. ``extra`` is what the process grew by at its peak, over the model's
bytes. torch-pruning is asked for a quarter of every width; graphprune gets the share of parameters that this leaves (a quarter
where the peer does not finish). It runs three times: as it is by default, which checks the result, finds the config that describes
it and leaves the model as it was (``ours``); the same ``in place``, as the peer is; and ``bare``, beside the model, without a
check or a config, which is all that the peer does.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from networks import NETWORKS, llama
from resident import Peak
from torch import nn

import graphprune

matplotlib.use("Agg")
from matplotlib import pyplot

SHARE = 0.25
OURS: dict[str, dict[str, Any]] = {"ours": {}, "in place": {"inplace": True}, "bare": {"verify": False, "alike": False}}
SYSTEMS = ("peer", *OURS)


def main() -> None:
    """Measure the networks named and print a table."""
    options = arguments()
    if options.one:
        print(json.dumps(one(options.one, options.networks[0], options.keep)))
        return
    rows: dict[str, dict[str, Any]] = {}
    print(
        f"{'network':>16} {'peer s':>8} " + " ".join(f"{name:>8} {'ratio':>6}" for name in OURS) + "  extra: peer, ours, in place"
    )
    for name in options.networks or NETWORKS:
        rows[name] = compared(name, options.pairs, options.limit)
        print(line(name, rows[name]), flush=True)
    if options.plot:
        plot(rows, options.plot)


def arguments() -> argparse.Namespace:
    """Command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("networks", nargs="*", choices=[*NETWORKS, []], help="all of them unless named")
    options.add_argument("--pairs", type=int, default=3)
    options.add_argument("--limit", type=float, default=120, help="CPU seconds a run may take")
    options.add_argument("--plot", type=Path)
    options.add_argument("--one", choices=SYSTEMS, help=argparse.SUPPRESS)
    options.add_argument("--keep", type=float, default=1 - SHARE, help=argparse.SUPPRESS)
    return options.parse_args()


def compared(name: str, pairs: int, limit: float) -> dict[str, Any]:
    """Interleaved runs of one network."""
    runs: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for _ in range(pairs):
        finished = not runs["peer"] or runs["peer"][-1] != {}
        runs["peer"].append(apart("peer", name, limit, 1 - SHARE) if finished else {})
        keep = runs["peer"][-1].get("kept", 1 - SHARE)
        for system in SYSTEMS[1:]:
            runs[system].append(apart(system, name, limit, keep))
    return {system: summary(found, runs["peer"]) for system, found in runs.items()}


def apart(system: str, name: str, limit: float, keep: float) -> dict[str, float]:
    """One run in a process of its own; nothing when it did not finish within the limit."""
    command = [sys.executable, "-W", "ignore", __file__, name, "--one", system, "--keep", str(keep)]
    limited = ["bash", "-c", f'ulimit -t {limit + 30:.0f}; exec "$@"', "-", *command]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{system} on {name}: exit {done.returncode} {done.stderr.strip()[-200:]}", file=sys.stderr)
        return {}
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, float]], peer: list[dict[str, float]]) -> dict[str, float | None]:
    """Medians; the ratio is the median of the pairs' ratios."""
    ratios = [run["seconds"] / other["seconds"] for run, other in zip(runs, peer, strict=True) if run and other]
    values = {key: statistics.median(run[key] for run in runs if run) for key in ("seconds", "extra", "kept") if any(runs)}
    return {**values, "ratio": statistics.median(ratios) if ratios else None}


def line(name: str, row: dict[str, Any]) -> str:
    """One line of the table."""

    def shown(value: float | None, form: str) -> str:
        return "—" if value is None else format(value, form)

    times = [f"{shown(row['peer'].get('seconds'), '.2f'):>8}"]
    times += [f"{shown(row[own].get('seconds'), '.2f'):>8} {shown(row[own]['ratio'], '.2f'):>6}" for own in OURS]
    extra = [f"{shown(row[system].get('extra'), '.2f'):>6}" for system in SYSTEMS[:3]]
    return " ".join([f"{name:>16}", *times, " ", *extra])


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Seconds over layers of the Llamas with as many KV heads as heads, both axes logarithmic."""
    depths = {name: int(name.removeprefix("llama-")) for name in rows if name.removeprefix("llama-").isdigit()}
    for system in SYSTEMS:
        points = sorted((layers, seconds) for name, layers in depths.items() if (seconds := rows[name][system].get("seconds")))
        pyplot.loglog([x for x, _ in points], [y for _, y in points], "o-", label=system)
    pyplot.xticks(list(depths.values()), [str(layers) for layers in depths.values()])
    pyplot.minorticks_off()
    pyplot.xlabel("layers")
    pyplot.ylabel("CPU seconds")
    pyplot.legend()
    pyplot.savefig(path)


# ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def one(system: str, name: str, keep: float) -> dict[str, float]:
    """CPU seconds from model to pruned model, the peak of the process over its start in model sizes, the share kept."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    prune = by_peer if system == "peer" else partial(by_us, OURS[system])
    prune(*llama(2, hidden=64, heads=2, kv=2), 0.9)
    model, inputs = NETWORKS[name]()
    before = sum(p.numel() for p in model.parameters())
    size = 4 * before
    gc.collect()
    with Peak() as peak:
        start = time.process_time()
        pruned = prune(model, inputs, keep)
        seconds = time.process_time() - start
    kept = sum(p.numel() for p in pruned.parameters()) / before
    return {"seconds": seconds, "extra": peak.extra / size, "kept": kept}


def by_us(options: dict[str, Any], model: nn.Module, inputs: Any, keep: float) -> nn.Module:
    """By the same magnitude."""
    kinds = ["head", "ffn"] if hasattr(model, "config") else None
    return graphprune.compile(model, inputs, keep=keep, keep_of="model", kinds=kinds, **options).model


def by_peer(model: nn.Module, inputs: Any, _keep: float) -> nn.Module:
    """As in torch-pruning's own examples for each kind of model."""
    import torch_pruning  # noqa: PLC0415  only the peer's process needs it

    warnings.simplefilter("ignore")
    heads, text = {}, hasattr(model, "config")
    for module in model.modules():
        if hasattr(module, "q_proj"):
            heads |= {module.q_proj: model.config.num_attention_heads}
            heads |= dict.fromkeys((module.k_proj, module.v_proj), model.config.num_key_value_heads)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        model, inputs, importance=torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=SHARE,
        ignored_layers=[last], num_heads=heads, prune_num_heads=text, head_pruning_ratio=SHARE,
        output_transform=(lambda out: out.logits) if text else None,
    )  # fmt: skip
    pruner.step()
    return model


if __name__ == "__main__":
    main()
