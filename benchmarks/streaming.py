"""Peak memory and time of a streamed compile, next to copying the same files; or under a memory limit, of one that scores.

    python benchmarks/streaming.py [--gigabytes 3] [--keep 0.8] [--experts 64]
    python benchmarks/streaming.py --gigabytes 0.4 --method flap --pass least_squares --limit 100

The first makes a sharded bfloat16 checkpoint with random weights, shard by shard, copies it with cp and compiles it in turns, and
prints the ratio of times, CPU seconds, and the peak resident size against 1 GiB and the two largest tensors. The second gives the
compile's process at most so many MiB of memory of its own (RLIMIT_DATA) beyond what it holds once everything is imported. With
experts the model is a mixture of so many a layer, of which the files hold a matrix each, as transformers saves them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from resident import status
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.core_model_loading import revert_weight_conversion

import graphprune
from graphprune.disk import INDEX, Checkpoint
from graphprune.streamed import compile_streamed

ROWS, LENGTH, BATCHES = 2, 64, 4
SHARD = 1 << 29


def main() -> None:
    """Measure and print."""
    options = arguments()
    if options.inside:
        measured(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "model"
        make(source, options)
        files = Checkpoint(source)
        sizes = sorted(entry.size for entry in files.entries.values())
        print(f"{sum(sizes) / 2**30:.2f} GiB in {len(files.files)} shards, two largest tensors {sum(sizes[-2:]) / 2**20:.0f} MiB")
        for _ in range(options.repeats):
            copied = copy(source, Path(folder) / "copy")
            row = json.loads(compiled(source, Path(folder) / "out"))
            bound = 1024 + sum(sizes[-2:]) / 2**20
            ratio = f"{row['seconds'] / copied[0]:.2f} of cp's {copied[0]:.1f} s (limit 2)"
            cpu = f"{row['cpu']:.1f} CPU s, cp's {copied[1]:.1f}"
            print(f"compile {row['seconds']:.1f} s, {ratio}; {cpu}; peak {row['peak']:.0f} MiB (limit {bound:.0f})", flush=True)


def make(folder: Path, options: argparse.Namespace) -> None:
    """A checkpoint of about so many bytes, Llama-like or a mixture of experts, never more than a shard in memory."""
    hidden, wide = options.hidden, 3 * options.hidden
    mixture = {"num_experts": options.experts, "moe_intermediate_size": wide // 4} if options.experts else {}
    config = (Qwen3MoeConfig if options.experts else LlamaConfig)(
        vocab_size=options.vocabulary, hidden_size=hidden, intermediate_size=wide, num_attention_heads=hidden // 64, head_dim=64,
        num_key_value_heads=hidden // 128, num_hidden_layers=1, dtype=torch.bfloat16, tie_word_embeddings=False, **mixture,
    )  # fmt: skip
    one, two = (_bytes(config, layers) for layers in (1, 2))
    config.num_hidden_layers = max(1, round((options.gigabytes * 2**30 - one) / (two - one)) + 1)
    folder.mkdir()
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(_shards(config), 1):
        file = f"model-{number:05}.safetensors"
        save_file({n: torch.randn(s, dtype=torch.bfloat16) * s[-1] ** -0.5 for n, s in shapes.items()}, folder / file)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _meta(config: PreTrainedConfig, layers: int | None = None) -> dict[str, tuple[int, ...]]:
    """What files hold of a model, by name."""
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": layers or config.num_hidden_layers})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        held = revert_weight_conversion(model, dict(model.named_parameters()))
    return {name: tuple(tensor.shape) for name, tensor in held.items()}


def _bytes(config: PreTrainedConfig, layers: int) -> int:
    return sum(2 * prod(shape) for shape in _meta(config, layers).values())


def _shards(config: PreTrainedConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    for name, shape in _meta(config).items():
        if shard and sum(2 * prod(s) for s in shard.values()) + 2 * prod(shape) > SHARD:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds that cp takes, by the clock and of CPU."""
    begun, worked = time.monotonic(), os.times()
    subprocess.run(["cp", "-r", source, target], check=True)
    taken, work = time.monotonic() - begun, os.times()
    shutil.rmtree(target)
    return taken, work.children_user + work.children_system - worked.children_user - worked.children_system


def compiled(source: Path, out: Path) -> str:
    """What a compile in a process of its own measured."""
    options = [argument for argument in sys.argv[1:] if not argument.startswith("--inside")]
    run = [sys.executable, __file__, *options, "--inside", str(source), str(out)]
    done = subprocess.run(run, stdout=subprocess.PIPE, text=True, check=True)
    shutil.rmtree(out)
    return done.stdout.splitlines()[-1]


def measured(options: argparse.Namespace) -> None:
    """Compile, and print seconds and peak MiB."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    source, out = options.inside
    calibration = None
    if options.method not in ("magnitude", "random"):
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, options.vocabulary, (BATCHES, ROWS, LENGTH), generator=draw)
        calibration = graphprune.Calibration(tuple({"input_ids": rows} for rows in ids), "drawn")
    if options.limit:
        allowed = status("VmData") + (options.limit << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    begun, worked = time.monotonic(), time.process_time()

    def show(stage: str) -> None:
        seconds = f"{time.monotonic() - begun:6.1f} s  {time.process_time():6.1f} CPU s"
        held, own = status("VmRSS") >> 20, status("VmData") >> 20
        print(f"{seconds}  {held} MiB resident, {own} MiB own  {stage}", file=sys.stderr, flush=True)

    compile_streamed(
        source, out, keep=options.keep, method=options.method, calibration=calibration, passes=options.extra, progress=show
    )
    show("done")
    seconds, cpu = time.monotonic() - begun, time.process_time() - worked
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": status("VmHWM") >> 20}))


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0, help="a mixture of so many a layer")
    parser.add_argument("--keep", type=float, default=0.8)
    parser.add_argument("--method", default="magnitude")
    parser.add_argument("--pass", dest="extra", action="append", default=[])
    parser.add_argument("--limit", type=int, help="MiB")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--folder", help="where the files go")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
