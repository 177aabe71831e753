"""What scoring by gradients takes beside the weights, next to one plain forward and backward pass of the same model.

    python benchmarks/memory.py [--layers 16] [--hidden 1024] [--length 256] [taylor llm_pruner:order=second fisher]

Resident memory in MiB, each in a process of its own, on one thread, in float32 and bfloat16: ``pass`` is what two plain passes
add to the weights that ask for the gradient of the embedding alone, so that activations are held and no gradient of a matrix is;
``freed`` the same with the gradient of each matrix, freed as it appears; ``scores`` what scoring heads and FFN channels by the same
two batches adds. ``ratio`` is (weights + scores) / (1.1 weights + pass).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from resident import Peak
from transformers import LlamaConfig, LlamaForCausalLM

import graphprune
from graphprune.pipeline import find_pass

Batches = tuple[dict[str, torch.Tensor], ...]
MIB = 1 << 20
VOCABULARY = 4000
DTYPES = ("float32", "bfloat16")


def main() -> None:
    """Measure and print."""
    options = arguments()
    if options.one:
        print(json.dumps(one(options, *options.one)))
        return
    print(f"{'dtype':>9} {'method':>24} {'weights':>8} {'pass':>6} {'freed':>6} {'scores':>7} {'ratio':>6}")
    for dtype in DTYPES:
        for method in options.methods:
            (weights, plain), (_, freed), (_, scores) = (apart(options, dtype, what) for what in ("pass", "freed", method))
            ratio = (weights + scores) / (1.1 * weights + plain)
            print(f"{dtype:>9} {method:>24} {weights:8.0f} {plain:6.0f} {freed:6.0f} {scores:7.0f} {ratio:6.2f}", flush=True)


def apart(options: argparse.Namespace, dtype: str, what: str) -> tuple[float, float]:
    """The weights, and what one run added to them, in MiB."""
    sizes = ["--layers", str(options.layers), "--hidden", str(options.hidden), "--length", str(options.length)]
    command = [sys.executable, "-W", "ignore", __file__, *sizes, "--one", dtype, what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    weights, added = json.loads(done.stdout.splitlines()[-1])
    return weights, added


def one(options: argparse.Namespace, dtype: str, what: str) -> tuple[float, float]:
    """The same, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = options.hidden
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 11 // 4, num_hidden_layers=options.layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256 or 1, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    batches = tuple({"input_ids": torch.randint(0, VOCABULARY, (1, options.length))} for _ in range(2))
    groups = graphprune.couple(graphprune.propagate(graphprune.trace(model, batches[0])))
    groups = replace(groups, groups=tuple(group for group in groups if group.kind in ("head", "ffn")))
    plain = what in ("pass", "freed")
    run = passes(model, batches, free=what == "freed") if plain else scoring(model, groups, batches, what)
    with torch.no_grad():
        model(**batches[0])
    with Peak() as peak:
        run()
    return sum(p.nbytes for p in model.parameters()) / MIB, peak.extra / MIB


def passes(model: LlamaForCausalLM, batches: Batches, *, free: bool) -> Callable[[], None]:
    """Two passes that hold activations; gradients of the layers' matrices are freed as they appear, or not even made."""
    table = model.get_input_embeddings().weight
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    model.requires_grad_(requires_grad=False)
    for weight in matrices if free else [table]:
        weight.requires_grad_(requires_grad=True)
        weight.register_post_accumulate_grad_hook(lambda leaf: setattr(leaf, "grad", None))

    def run() -> None:
        for batch in batches:
            graphprune.language_loss(model, batch).backward()

    return run


def scoring(model: LlamaForCausalLM, groups: graphprune.Groups, batches: Batches, method: str) -> Callable[[], None]:
    """The scores of a gradient method."""
    name, *settings = method.split(":")
    score = find_pass(name, **dict(setting.split("=") for setting in settings))
    calibration = graphprune.Calibration(batches, "drawn")
    return lambda: score({torch.nn.Module: model, graphprune.Groups: groups, graphprune.Calibration: calibration})


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("methods", nargs="*", default=["taylor", "llm_pruner:order=second", "fisher"])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
