"""Nothing in, what a command line may be told out: the type of every option that ``compile`` or more than one command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

Model = Annotated[str, Argument(help="A checkpoint directory, a GGUF file, a hub name, or file.py:factory.")]
Output = Annotated[Path, Option("--output", "-o", help="The directory to write. It must not exist, or be empty.")]

Keep = Annotated[float | None, Option(help="Share of the prunable parameters to keep (default 0.8).")]
KeepOf = Annotated[str, Option(help="Count the share over the prunable 'groups' or the whole 'model'.")]
Method = Annotated[
    str | None,
    Option(help="A pass that scores: NAME[:option=value…] or FILE.py[:function] (default: the best with --calibration)."),
]
Kinds = Annotated[str | None, Option(help="Kinds of groups to prune, with commas: head,ffn,… (default: by architecture).")]
Scope = Annotated[str | None, Option(help="'local': every layer the same share; 'global': the least important anywhere.")]
Target = Annotated[
    list[str] | None,
    Option(help="In place of --keep, a share of the whole model: parameters|bytes|flops|kv|latency=0.7; repeatable."),
]
RoundTo = Annotated[int | None, Option(help="Keep multiples of this many units (default: of 16 or 64 for wide FFNs; 1: any).")]
Minimum = Annotated[int, Option(help="Keep at least this many units of every group.")]
Protect = Annotated[list[str] | None, Option(help="A module, tensor or glob to leave alone; repeatable.")]
Alike = Annotated[bool | None, Option("--alike/--differ", help="Let equal layers shrink alike (a stock config needs it).")]
Emit = Annotated[str, Option(help="'module': the original classes; 'graph': an exported program.")]
Verify = Annotated[bool, Option("--verify/--no-verify", help="Check the smaller model against the masked original.")]

Text = Annotated[
    str | None, Option(help="self (sampled from the model), a text file, .jsonl[:field], or a datasets name; several: a+b.")
]
Samples = Annotated[int | None, Option(help="Calibration sequences (default: what the method wants).")]
Length = Annotated[int | None, Option(help="Tokens of each.")]
Batch = Annotated[int, Option(help="Sequences a batch.")]
Extra = Annotated[
    list[str] | None, Option("--pass", help="A further pass: NAME[:option=value…] or FILE.py[:function]; repeatable.")
]
Checkpointing = Annotated[
    bool, Option("--checkpointing", help="Compute activations twice instead of keeping them for the backward pass.")
]

Stream = Annotated[
    bool, Option("--stream", help="Never hold the model: read, prune and write a checkpoint directory tensor by tensor.")
]
Seed = Annotated[int, Option(help="Seed of everything drawn.")]
Device = Annotated[str, Option(help="Where the model is and everything is computed: cpu, cuda, cuda:1, …")]
Dtype = Annotated[str | None, Option(help="Load as float32, bfloat16, … (default: as stored).")]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
