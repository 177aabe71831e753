"""A checkpoint pruned tensor by tensor: the same plan and tensors as in memory, whole or not there, within a memory limit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, get_ident
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import graphprune
from graphprune import abreast, disk
from graphprune.cli import main
from graphprune.disk import Checkpoint, OnDisk, put
from graphprune.errors import GraphpruneError, UserMistake
from graphprune.parts import Assembled, layout
from graphprune.rewrite import stream
from graphprune.rewrite.folder import complete_or_nothing
from graphprune.streamed import compile_streamed
from tests.models import VOCABULARY, llama, sharpened
from tests.zoo.entries import build


def saved(
    folder: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32, shard: str = "30KB", layers: int = 2, hidden: int = 48
) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=40 + hidden, num_hidden_layers=layers, num_attention_heads=6,
        num_key_value_heads=3, tie_word_embeddings=tied,
    )  # fmt: skip
    model = sharpened(transformers.LlamaForCausalLM(config)).to(dtype)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("method", ["magnitude", "random"])
@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_same_plan_and_tensors_as_in_memory(tmp_path: Path, method: str, tied: bool, dtype: torch.dtype) -> None:
    source = saved(tmp_path / "model", tied=tied, dtype=dtype)
    result = compile_streamed(source, tmp_path / "out", keep=0.6, method=method, seed=3)
    opened = graphprune.open_source(source)
    whole = graphprune.compile(opened.model, opened.example_inputs(), keep=0.6, method=method, seed=3)
    assert result.plan.dumps() == whole.plan.dumps()
    assert whole.pruned.config is not None
    kept, found = whole.model.state_dict(), tensors(tmp_path / "out")
    assert all(torch.equal(tensor, kept[name]) and tensor.dtype is dtype for name, tensor in found.items())
    assert found.keys() == tensors(source).keys()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**opened.example_inputs()).logits, whole.model(**opened.example_inputs()).logits)
    assert (tmp_path / "out" / "tokenizer_config.json").read_text() == "{}"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert set(index["weight_map"]) == found.keys()


def test_a_plan_is_replayed(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    first = compile_streamed(source, tmp_path / "one", keep=0.7)
    compile_streamed(source, tmp_path / "two", plan=first.plan)
    assert all(torch.equal(t, tensors(tmp_path / "two")[name]) for name, t in tensors(tmp_path / "one").items())


def test_nothing_is_left_of_a_run_that_fails_and_a_dead_one_is_cleared_away(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    dead = tmp_path / ".out.12345678.part"
    dead.mkdir()
    (dead / ".writing").write_text("")
    with pytest.raises(ZeroDivisionError), complete_or_nothing(tmp_path / "out") as folder:
        assert not dead.exists()
        assert len(list(tmp_path.glob(".out.*.part"))) == 1
        with pytest.raises(ZeroDivisionError), complete_or_nothing(tmp_path / "out"):
            assert folder.exists()
            raise ZeroDivisionError
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    compile_streamed(source, tmp_path / "out")
    with pytest.raises(GraphpruneError, match="not empty"):
        compile_streamed(source, tmp_path / "out")


def test_a_run_is_alive_until_its_output_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.replace

    def slowly(part: Path, name: Path) -> Path:
        with pytest.raises(ZeroDivisionError), complete_or_nothing(name):  # another run begins now
            raise ZeroDivisionError
        return rename(part, name)

    monkeypatch.setattr(Path, "replace", slowly)
    with complete_or_nothing(tmp_path / "out") as folder:
        (folder / "weights").write_text("all of them")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["weights"]


def test_a_damaged_or_foreign_checkpoint_is_refused_with_the_reason(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", shard="1GB")
    state = load_file(source / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layers.1.mlp.up" not in k}, source / "model.safetensors")
    with pytest.raises(GraphpruneError, match=r"up_proj.weight cannot be streamed"):
        compile_streamed(source, tmp_path / "out")
    raw = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(GraphpruneError, match="cannot be used"):
        compile_streamed(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", [0, errno.EXDEV, errno.ENOSPC])
def test_pieces_are_copied_whether_or_not_the_system_can(tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> int:
        raise OSError(code, "no")

    if code:
        monkeypatch.setattr(os, "copy_file_range", refused)
    monkeypatch.setattr(stream, "BLOCK", 7)
    (tmp_path / "from").write_bytes(bytes(range(100)))
    with (tmp_path / "to").open("wb", buffering=0) as target:
        if code == errno.ENOSPC:
            with pytest.raises(OSError, match="no"):
                stream._copy(tmp_path / "from", [(3, 20)], target)
            return
        stream._copy(tmp_path / "from", [(3, 20), (40, 0), (50, 9)], target)
        with pytest.raises(GraphpruneError, match="ends too early"):
            stream._copy(tmp_path / "from", [(90, 20)], target)
    assert (tmp_path / "to").read_bytes() == bytes([*range(3, 23), *range(50, 59), *range(90, 100)])


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_room_on_the_disk_is_asked_for_before_anything_is_written(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(file: int, *_: Any) -> None:
        assert os.fstat(file).st_size == 0
        raise OSError(code, "no")

    source = saved(tmp_path / "model", shard="1GB")
    monkeypatch.setattr(os, "posix_fallocate", refused)
    if code == errno.ENOSPC:
        with pytest.raises(GraphpruneError, match="could not be written"):
            compile_streamed(source, tmp_path / "out")
        assert os.listdir(tmp_path) == ["model"]
    else:
        compile_streamed(source, tmp_path / "out")
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def drawn(rows: int = 6) -> graphprune.Calibration:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(0, VOCABULARY, (rows, 11), generator=draw)
    return graphprune.Calibration(tuple({"input_ids": pair} for pair in ids.split(2)), "drawn")


@pytest.mark.parametrize(
    ("method", "repair"), [("wanda_sp", ()), ("minitron", ()), ("taylor", ()), ("flap", ("least_squares:damping=0.01",))]
)
def test_scores_and_repairs_from_disk_are_those_from_memory(
    tmp_path: Path, method: str, repair: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(abreast, "STRETCH", 20_000)
    source = saved(tmp_path / "model", tied=method == "flap")
    options: dict[str, Any] = {"keep": 0.6, "method": method, "calibration": drawn(), "passes": repair}
    result = compile_streamed(source, tmp_path / "out", **options)
    whole = graphprune.compile(graphprune.open_source(source).model, **options)
    assert result.plan.dumps() == whole.plan.dumps()
    kept, found = whole.model.state_dict(), tensors(tmp_path / "out")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in found.items())
    if repair:
        cut = tensors(compile_streamed(source, tmp_path / "cut", plan=result.plan).path)
        assert {name.split(".")[-2] for name in found if not torch.equal(found[name], cut[name])} == {"o_proj", "down_proj"}


def test_a_newton_step_on_disk_is_the_one_in_memory(tmp_path: Path) -> None:
    source = saved(tmp_path / "model", tied=True)
    options: dict[str, Any] = {"keep": 0.6, "method": "magnitude", "calibration": drawn(20), "passes": ["newton"]}
    result = compile_streamed(source, tmp_path / "out", **options)
    whole = graphprune.compile(graphprune.open_source(source).model, **options)
    assert not result.notes and not whole.notes
    kept, found = whole.model.state_dict(), tensors(tmp_path / "out")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, kept[name], rtol=1e-5, atol=1e-7)
    cut = tensors(compile_streamed(source, tmp_path / "cut", plan=result.plan).path)
    assert {name for name in found if not torch.equal(found[name], cut[name])} == {name for name in found if found[name].ndim == 1}


def test_a_stretch_reads_no_more_than_its_limit_and_ends_where_little_is_alive(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    opened = graphprune.open_source(source)
    axes = graphprune.propagate(graphprune.trace(opened.model, opened.example_inputs()))
    sizes = {t.name: t.dtype.itemsize * torch.Size(t.shape).numel() for t in axes.trace.tensors.values()}
    nodes = list(axes.trace.graph.nodes)
    walk = abreast.Abreast(axes.trace, Checkpoint(source), [], nodes)
    for limit in (20_000, 60_000, 10**9):
        stretches = list(walk.stretches(nodes, limit))
        assert [node for stretch in stretches for node in stretch] == nodes
        reads = [[name for node in stretch for name in walk.weights(node)] for stretch in stretches]
        assert all(sum(sizes[name] for name in read) <= limit or len(read) == 1 for read in reads)
        assert len(stretches) > 1 or limit == 10**9
    held: list[int] = []
    tensors_of = dict(opened.model.named_parameters()) | dict(opened.model.named_buffers())

    class Counted(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            held.append(sum(t.numel() * t.element_size() for t in running.tensors.now.values()))
            return super().__getitem__(name)

    running = abreast.Abreast(axes.trace, Counted(tensors_of), [axes.trace.flatten(opened.example_inputs())] * 2, nodes)
    for stretch in running.stretches(nodes, 60_000):
        running.run(stretch)
    assert max(held) <= 60_000
    assert len(held) == len({n for node in nodes for n in running.weights(node)})
    assert not running.tensors.now


def test_a_weight_in_a_file_is_not_silently_changed_in_memory(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    entry = Checkpoint(source).entries["model.norm.weight"]
    weight = OnDisk.of(entry)
    with pytest.raises(GraphpruneError, match="in place"):
        weight.mul_(2)
    before = entry.read()
    put(weight, 2 * before)
    assert torch.equal(weight + 0, 2 * before)
    assert torch.equal(tensors(source)["model.norm.weight"], 2 * before)


def test_what_needs_the_whole_model_says_so_and_writes_nothing(tmp_path: Path) -> None:
    source = saved(tmp_path / "model")
    for options, words in (
        ({"method": "flap", "calibration": drawn(), "passes": ["mean_bias:add=true"]}, "in memory"),
        ({"method": "flap"}, "Calibration"),
    ):
        with pytest.raises(GraphpruneError, match=words):
            compile_streamed(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_inspect_reads_no_weight(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "model", shard="1GB")
    for spoil in (lambda file: file.write_bytes(b"no tensor in here"), lambda file: file.unlink()):
        spoil(source / "model.safetensors")
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["inspect", str(source), "--json"])
        assert {"head", "ffn"} <= {row["kind"] for row in json.loads(capsys.readouterr().out)}


def test_a_model_that_does_not_fit_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = saved(tmp_path / "model"), tmp_path / "out"
    monkeypatch.setattr(disk, "available_memory", lambda: 1000)
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["compile", str(source), "-o", str(out)])
    assert "--stream" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"^0$"):
        main(
            ["compile", str(source), "-o", str(out), "--stream", "--keep", "0.7", "--method", "wanda_sp", "--calibration", "random"]
        )
    plan = str(out / "graphprune_plan.json")
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["apply", plan, str(source), "-o", str(tmp_path / "again"), "--stream"])
    assert all(torch.equal(tensor, tensors(tmp_path / "again")[name]) for name, tensor in tensors(out).items())


@pytest.mark.long
def test_a_model_of_four_times_the_allowed_memory_is_scored_cut_and_repaired(tmp_path: Path) -> None:
    """The limit is on what the process has of its own beyond what it holds when everything is imported."""
    script = Path(__file__).parent.parent / "benchmarks" / "streaming.py"
    sizes = ["--gigabytes", "1", "--hidden", "1024", "--vocabulary", "8000", "--limit", "256", "--repeats", "1"]
    options = [*sizes, "--method", "flap", "--pass", "least_squares:damping=0.01", "--folder", tmp_path]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    assert "compile" in done.stdout


KILLED = """
import os, random, shutil, signal, sys, threading, time, torch
from pathlib import Path
from graphprune.rewrite import stream
from graphprune.streamed import compile_streamed

torch.set_num_threads(1)
source, out, how, seed, times = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
draw, done, actions, lock = random.Random(seed), [0], (stream.write_all, stream._copied), threading.Lock()

def watched(function, last):
    def call(*given):
        with lock:
            done[0] += 1
            if done[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*given)
    return call

def compiled(last=None):
    stream.write_all, stream._copied = (watched(action, last) for action in actions)
    compile_streamed(source, out, keep=0.6)

def forked(last=None):
    child = os.fork()
    if not child:
        compiled(last)
        os._exit(0)
    return child

def writing():
    return any(out.parent.glob(".out.*.part/*.safetensors"))

def window(end):
    child, begun = forked(), None
    while begun is None or time.monotonic() - begun < end:
        if begun is not None and out.exists():
            break
        begun = begun or (time.monotonic() if writing() else None)
        time.sleep(0.001)
    taken = time.monotonic() - begun
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return taken

whole = out.parent / "whole"
if how == "steps":
    compiled()  # counts them
    moments = [draw.randint(1, done[0]) for _ in range(times)]
    done[0] = 0
else:
    taken = window(1000)
    moments = [taken * draw.random() for _ in range(times)]
out.rename(whole)
for moment in moments:
    if how == "steps":
        assert os.waitpid(forked(moment), 0)[1] == signal.SIGKILL, moment
    else:
        window(moment)
    print(out.exists(), len(list(out.parent.glob(".out.*.part"))), moment, flush=True)
    if out.exists():
        assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in whole.iterdir()}
        shutil.rmtree(out)
done[0] = 0
compile_streamed(source, out, keep=0.6)
"""


def kill(folder: Path, source: Path, how: str, seed: int, times: int) -> list[list[str]]:
    given = [KILLED, source, folder / "out", how, str(seed), str(times)]
    done = subprocess.run([sys.executable, "-c", *given], capture_output=True, text=True, check=False, timeout=1800)
    assert not done.returncode, done.stderr[-2000:]
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out", "whole"]
    for file in (folder / "whole").iterdir():
        assert (folder / "out" / file.name).read_bytes() == file.read_bytes()
    return [line.split() for line in done.stdout.splitlines()]


def test_killed_at_any_step_it_leaves_nothing_that_looks_complete_and_the_next_run_clears_up(tmp_path: Path) -> None:
    found = kill(tmp_path, saved(tmp_path / "model"), "steps", 11, 4)
    assert [row[:2] for row in found] == [["False", "1"]] * 4


@pytest.mark.long
def test_killed_at_any_time_while_two_threads_write_it_is_whole_or_not_there(tmp_path: Path) -> None:
    found = kill(tmp_path, saved(tmp_path / "model", shard="9MB", hidden=480, layers=8), "time", 12, 24)
    assert {tuple(row[:2]) for row in found} <= {("False", "1"), ("True", "0")}
    assert sum(row[0] == "False" for row in found) > 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mixtral", "expert"), ("qwen3_moe", "expert")]
    + [(name, None) for name in ("mixtral", "qwen3_moe", "gpt_neox", "glm", "mamba2", "olmo_hybrid", "gemma3", "nomic_bert")],
)
def test_what_files_hold_in_other_parts_is_cut_as_in_memory(name: str, kind: str | None, tmp_path: Path) -> None:
    """A file for each expert, fused or split projections, other names: transformers puts them together, and takes them apart."""
    model: Any = build(name, "all").model
    model.save_pretrained(tmp_path / "model")
    opened = graphprune.open_source(tmp_path / "model")
    options: Any = {"keep": 0.55, "kinds": kind and [kind]}
    whole = graphprune.compile(opened.model, opened.example_inputs(), method="magnitude", **options)
    graphprune.save(whole, tmp_path / "whole", opened)
    result = compile_streamed(tmp_path / "model", tmp_path / "out", **options)
    assert result.plan.dumps() == whole.plan.dumps()
    mine, theirs, before = (tensors(tmp_path / folder) for folder in ("out", "whole", "model"))
    assert mine.keys() == theirs.keys()
    assert sum(tensor.numel() for tensor in mine.values()) < sum(tensor.numel() for tensor in before.values())
    found: Any = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, whole.model.state_dict()[name]) for name, tensor in found.items())


def test_a_repair_writes_where_the_files_hold_the_parts(tmp_path: Path) -> None:
    model: Any = build("hrm_text", "all").model
    model.save_pretrained(tmp_path / "model")
    files = Checkpoint(tmp_path / "model")
    places = layout(model, files)
    before = {name: place.entry.read() for name, place in places.items()}
    assembled = [name for name, place in places.items() if isinstance(place.entry, Assembled)]
    changed = {name: torch.randn(before[name].shape) for name in assembled[::2]}
    for name, value in changed.items():
        places[name].entry.write(value)
    assert len(changed) > 5
    assert all(torch.equal(place.entry.read(), changed.get(name, before[name])) for name, place in places.items())
    loaded = type(model).from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in changed.items())


def test_a_config_that_computes_another_buffer_is_none(tmp_path: Path) -> None:
    """Gemma scales its embeddings by the root of the width that its config says."""
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.GemmaConfig(vocab_size=VOCABULARY, head_dim=12, **sizes)
    transformers.GemmaForCausalLM(config).save_pretrained(tmp_path / "model")
    with pytest.raises(GraphpruneError, match="none computes the same"):
        compile_streamed(tmp_path / "model", tmp_path / "out", keep=0.6, kinds=["hidden"])
    assert not (tmp_path / "out").exists()


def test_memory_is_given_back_by_the_smaller_of_sizes_within_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(disk, "_tell", lambda *call: told.append(call))
    with disk.given_back(1 << 17), disk.given_back(4 << 20):
        pass
    apart = [size for function, *arguments in told if function == "mallopt" for size in arguments[1:]]
    assert apart[::2] == apart[1::2] == [1 << 17, 1 << 17, 1 << 17, 32 << 20]


@pytest.mark.parametrize("count", [1, 3])
def test_what_lies_in_files_is_read_by_threads_that_compute_alone(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    monkeypatch.setattr(disk, "READERS", 2)
    try:
        meet = Barrier(min(count, 2))
        with disk.threads() as readers:
            seen = [readers.submit(lambda: (meet.wait(10), torch.get_num_threads(), get_ident())[1:]) for _ in range(meet.parties)]
        assert [number for number, _ in (done.result() for done in seen)] == [1] * meet.parties
        assert len({thread for _, thread in (done.result() for done in seen)}) == meet.parties
        with ThreadPoolExecutor(1) as fresh:
            assert torch.get_num_threads() == fresh.submit(torch.get_num_threads).result() == count
    finally:
        torch.set_num_threads(before)


def test_what_stands_beside_the_weights_goes_along_either_way(tmp_path: Path) -> None:
    """Settings for generation that an old config says by itself, a processor, further chat templates; of two kinds of weights those
    that transformers reads."""
    source = tmp_path / "model"
    llama().save_pretrained(source)
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_beams": 4, "min_length": 12, "max_length": 30}))
    (source / "preprocessor_config.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    compile_streamed(source, tmp_path / "streamed")
    opened = graphprune.open_source(source)
    graphprune.save(graphprune.compile(opened.model, method="magnitude"), tmp_path / "whole", opened)
    for name in ("streamed", "whole"):
        beside = {str(file.relative_to(tmp_path / name)) for file in (tmp_path / name).rglob("*")}
        assert beside >= {"preprocessor_config.json", "additional_chat_templates/tools.jinja"}
        loaded = transformers.GenerationConfig.from_pretrained(tmp_path / name)
        assert (loaded.num_beams, loaded.min_length, loaded.max_length) == (4, 12, 30)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserMistake, match="an adapter beside its weights"):
        compile_streamed(tmp_path / "model", tmp_path / "out")
