"""The command line in, checkpoints and tables out. Every command is a thin face of a public function."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from graphprune import __version__, options
from graphprune.bench import figures
from graphprune.budget import Budget
from graphprune.compiler import compile
from graphprune.console import err, out, progress, shown
from graphprune.data import calibrate, read_texts
from graphprune.default import default_for
from graphprune.disk import check_fits
from graphprune.errors import GraphpruneError, UserMistake, first_line
from graphprune.evaluate import perplexity, published
from graphprune.groups import couple
from graphprune.listing import explained, rows, tables
from graphprune.masking import statistics_of
from graphprune.masks import find_mask, sparsify, zeros
from graphprune.output import save, save_model
from graphprune.pieces import branches, layers
from graphprune.pipeline import find_pass, find_scorer
from graphprune.plan import load_plan
from graphprune.propagate import propagate
from graphprune.ranks import joined, leads
from graphprune.recover import recover
from graphprune.replay import replay
from graphprune.report import side_by_side
from graphprune.rewrite.folder import check_free
from graphprune.source import open_source
from graphprune.sparse import SPARSE, pattern_of
from graphprune.streamed import compile_streamed
from graphprune.trace import trace
from graphprune.words import calibration_for, device_of, dtype_of, enable_checkpointing, harness, listed, shares_of
from graphprune.written import reads_tokens

app = typer.Typer(
    help="graphprune makes PyTorch models physically smaller.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """graphprune makes PyTorch models physically smaller."""
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command("compile")
def compile_(
    model: options.Model,
    output: options.Output,
    keep: options.Keep = None,
    keep_of: options.KeepOf = "groups",
    method: options.Method = None,
    kinds: options.Kinds = None,
    scope: options.Scope = None,
    target: options.Target = None,
    round_to: options.RoundTo = None,
    minimum: options.Minimum = 1,
    protect: options.Protect = None,
    alike: options.Alike = None,
    emit: options.Emit = "module",
    verify: options.Verify = True,
    calibration: options.Text = None,
    samples: options.Samples = None,
    length: options.Length = None,
    batch: options.Batch = 4,
    extra: options.Extra = None,
    checkpointing: options.Checkpointing = False,
    stream: options.Stream = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    debug: options.Debug = False,
) -> None:
    """Prune MODEL and write a smaller checkpoint that from_pretrained loads."""
    _check(model, output, stream)
    if stream and (dtype or emit != "module" or alike is False):
        raise UserMistake("--stream writes a stock checkpoint in the dtype it finds", fix="leave out --dtype, --emit and --differ")
    shares, there = shares_of(target or ()), device_of(device)
    if shares and keep is not None:
        raise UserMistake("--keep and --target are two ways to say how much may stay", fix="leave out one")
    share = 0.8 if keep is None else keep
    Budget(share, keep_of, scope or "local", None, protect or (), round_to, minimum, target=shares)  # its mistakes come first
    asked = [*([find_scorer(method)] if method else []), *map(find_pass, extra or [])]
    with progress() as show:
        show("opening")
        source = open_source(model, dtype=dtype_of(dtype), weights=not stream, device=there)
        default = default_for(source.model, calibration is not None, listed(kinds) or (), method, streamed=stream)
        steps = asked if method else [*map(find_pass, (default.method, *default.passes)), *asked]
        settings: dict[str, Any] = {
            "keep": share, "keep_of": keep_of, "method": steps[0], "kinds": listed(kinds), "scope": scope or default.scope,
            "round_to": round_to, "minimum": minimum, "protect": protect or (), "seed": seed, "passes": steps[1:],
            "target": shares,
        }  # fmt: skip
        sizes = default.samples if samples is None else samples, default.length if length is None else length
        text = calibration_for(steps, source, calibration, *sizes, batch, seed, show)
        if stream:
            streamed = compile_streamed(model, output, **settings, calibration=text, device=there, progress=show)
            shown(streamed, output, default.note)
            return
        if checkpointing:
            enable_checkpointing(source)
        example = None if text else source.example_inputs()
        settings |= {"alike": alike, "emit": emit, "verify": verify, "calibration": text, "inplace": True}
        result = compile(source.model, example, **settings, progress=show)
        show("saving")
        save(result, output, source)
    shown(result, output, default.note)


@app.command()
def inspect(
    model: options.Model,
    explain: Annotated[
        str | None, typer.Option(help="A tensor or group: print why it is coupled to what it is, or frozen.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the groups as JSON.")] = False,
    debug: options.Debug = False,
) -> None:
    """Show the coupled groups of MODEL, and what is frozen and why. No weight is loaded."""
    with progress() as show:
        show("tracing")
        source = open_source(model, weights=False)
        axes = propagate(trace(source.model, source.example_inputs()))
        found = [couple(axes), layers(axes), branches(axes)]
    if explain:
        out.print(explained(found, explain), markup=False, highlight=False, soft_wrap=True)
    elif as_json:
        print(json.dumps(rows(found), indent=1))
    else:
        out.print(*tables(found), sep="\n")


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="A plan file, or the directory it lies in.")],
    model: options.Model,
    output: options.Output,
    emit: options.Emit = "module",
    stream: options.Stream = False,
    dtype: options.Dtype = None,
    debug: options.Debug = False,
) -> None:
    """Prune MODEL exactly as PLAN, or the one in a directory that compile wrote, says."""
    _check(model, output, stream)
    chosen = load_plan(plan)
    if stream:
        with progress() as show:
            streamed = compile_streamed(model, output, plan=chosen, progress=show)
        shown(streamed, output)
        return
    with progress() as show:
        show("opening")
        source = open_source(model, dtype=dtype_of(dtype))
        show("pruning")
        result = replay(source.model, chosen, source.example_inputs(), emit=emit, inplace=True)
        show("saving")
        save(result, output, source)
    shown(result, output)


@app.command("sparsify")
def sparsify_(
    model: options.Model,
    output: options.Output,
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt or a pass of yours.")] = "wanda",
    sparsity: Annotated[float | None, typer.Option(help="Share of zeros (default 0.5).")] = None,
    pattern: Annotated[str | None, typer.Option(help="Keep n of every m inputs: 2:4, 4:8, …")] = None,
    calibration: Annotated[str, typer.Option(help="self, a text file, .jsonl[:field], or a datasets name.")] = "self",
    samples: Annotated[int, typer.Option(help="Calibration sequences.")] = 32,
    length: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    debug: options.Debug = False,
) -> None:
    """Write zeros into the weights of MODEL and keep its shapes."""
    _check(model, output)
    there, step, _ = device_of(device), find_mask(method), pattern_of(sparsity, pattern)
    with progress() as show:
        show("opening")
        source = open_source(model, dtype=dtype_of(dtype), device=there)
        show("calibration text")
        text = calibrate(calibration, source, samples=samples, length=length, seed=seed) if statistics_of(step) else None
        sparse = sparsify(
            source.model,
            text,
            method=step,
            sparsity=sparsity,
            pattern=pattern,
            example_inputs=source.example_inputs(),
            progress=show,
        )
        show("saving")
        save_model(sparse, output, source)
    shares = [share for share in zeros(sparse).values() if share >= SPARSE]
    out.print(f"{output}: {len(shares)} sparse tensors, {sum(shares) / max(1, len(shares)):.1%} zeros", highlight=False)


@app.command("recover")
def recover_(
    model: options.Model,
    output: options.Output,
    data: Annotated[str, typer.Option(help="Text to learn from: a text file, .jsonl[:field], or a datasets name.")],
    teacher: Annotated[str | None, typer.Option(help="The unpruned model, to learn its predictions too.")] = None,
    preset: Annotated[str, typer.Option(help="llm-pruner (LoRA, the published recipe) or ten-minutes.")] = "llm-pruner",
    minutes: Annotated[float | None, typer.Option(help="Stop after this long.")] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    debug: options.Debug = False,
) -> None:
    """Train a pruned MODEL back towards what it was and write a plain checkpoint."""
    _check(model, output)
    there = device_of(device)
    with progress() as show:
        show("opening")
        source = open_source(model, dtype=dtype_of(dtype), device=there)
        tutor = open_source(teacher, dtype=dtype_of(dtype), device=there).model if teacher else None
        limits = {} if minutes is None else {"minutes": minutes}
        trained = recover(
            source.model, read_texts(data), teacher=tutor, tokenizer=source.tokenizer(), preset=preset, seed=seed,
            progress=show, **limits,
        )  # fmt: skip
        show("saving")
        save_model(trained, output, source)
    out.print(f"{output}: trained, a checkpoint like {model}", highlight=False)


@app.command("eval")
def evaluate(
    model: options.Model,
    text: Annotated[str | None, typer.Option(help="For perplexity: a text file, .jsonl[:field], or a datasets name.")] = None,
    length: Annotated[int, typer.Option(help="Tokens a window.")] = 512,
    protocol: Annotated[str | None, typer.Option(help="A paper's protocol: llm-pruner or wanda.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas; needs graphprune\\[tasks].")] = None,
    include: Annotated[Path | None, typer.Option(help="A directory with task descriptions of your own.")] = None,
    shots: Annotated[int | None, typer.Option(help="Examples before each question (default: the task's).")] = None,
    limit: Annotated[int | None, typer.Option(help="At most this many windows, or questions a task.")] = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    debug: options.Debug = False,
) -> None:
    """Measure the perplexity of MODEL on a text, or its scores on lm-eval tasks; the protocol is part of the result."""
    if not text and not tasks:
        raise UserMistake("nothing to measure", fix="--text FILE, or --tasks NAME,…")
    judge = harness() if tasks else None
    source = open_source(model, dtype=dtype_of(dtype), device=device_of(device))
    if text:
        how = published(protocol, source.model) if protocol else None
        found = perplexity(source.model, source.tokenizer(), read_texts(text), length=length, limit=limit, protocol=how)
        out.print(str(found))
    if judge:
        scores = judge.evaluate_tasks(
            source.model, source.tokenizer(), listed(tasks) or [], include=include, shots=shots, limit=limit
        )
        for task, row in scores.items():
            out.print(f"{task}  {' '.join(f'{name} {value:.4f}' for name, value in row.items())}", markup=False, highlight=False)


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help="Models to time against each other; ratios are to the first.")],
    prompt: Annotated[int, typer.Option(help="Tokens read.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens written.")] = 32,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    device: options.Device = "cpu",
    dtype: options.Dtype = None,
    debug: options.Debug = False,
) -> None:
    """Time MODELS in turns, while reading and writing, beside the ideal. What is no language model: a forward."""
    there = device_of(device)
    sources = {name: open_source(name, dtype=dtype_of(dtype), device=there) for name in models}
    opened = {name: source.model.eval() for name, source in sources.items()}
    written = all(getattr(model, "can_generate", bool)() and reads_tokens(model) for model in opened.values())
    inputs = None if written else next(iter(sources.values())).example_inputs()
    out.print(side_by_side(figures(opened, inputs, prompt=prompt, new_tokens=new_tokens, repeats=repeats)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. Exit codes: 0, 1 (failed), 2 (usage)."""
    if arguments is None:  # the process is ours: what is imported stays, and looking for garbage in it would take a second
        gc.freeze()
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with joined():
            out.quiet = err.quiet = not leads()
            app(given, standalone_mode=True)
    except (GraphpruneError, torch.OutOfMemoryError) as failure:
        if "--debug" in given:
            raise
        error = failure if isinstance(failure, GraphpruneError) else _too_large(failure)
        err.print(f"[bold red]error[/] {type(error).__name__}", highlight=False)
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(error.exit_code) from None


# ── leaves ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _check(model: str, output: Path, stream: bool = False) -> None:
    """What can go wrong before anything is read."""
    if leads():
        check_free(output)
    if not stream:
        check_fits(model)


def _too_large(error: Exception) -> UserMistake:
    fix = "--device cpu, a smaller --batch, or --stream"
    return UserMistake("the model and what is computed do not fit into the device's memory", why=first_line(error), fix=fix)
