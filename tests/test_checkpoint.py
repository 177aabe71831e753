"""What is written: complete or nothing, stock where it can be, loadable by a stranger, the same bytes from the same plan."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import graphprune
from graphprune.errors import ModelLimit, UserMistake
from graphprune.output import save_model
from graphprune.plan import PLAN
from graphprune.rewrite import module, record
from graphprune.rewrite.folder import check_free
from tests.models import Residual, bert, gpt2, llama, residual, sharpened, tokens

STRANGER = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([[5, 17, 3, 60, 9]])
with torch.no_grad():
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    print(cached.tolist() == plain.tolist(), model(ids).logits.double().sum().item())
assert "graphprune" not in sys.modules
"""


def test_a_stranger_loads_a_stock_checkpoint(tmp_path: Path) -> None:
    result = graphprune.compile(llama(), {"input_ids": tokens()}, keep=0.6, kinds=["head", "ffn"])
    graphprune.save(result, tmp_path / "out")
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, tmp_path / "out"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    same, total = run.stdout.split()
    with torch.no_grad():
        expected = result.model(torch.tensor([[5, 17, 3, 60, 9]])).logits.double().sum().item()
    assert same == "True"
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert not any(name.suffix in (".bin", ".pkl", ".pt", ".py") for name in (tmp_path / "out").iterdir())


def test_a_plan_reproduces_the_same_bytes(tmp_path: Path) -> None:
    model, ids = llama(tied=True), {"input_ids": tokens()}
    result = graphprune.compile(model, ids, keep=0.7, method="random", seed=5)
    graphprune.save(result, tmp_path / "one")
    plan = graphprune.load_plan(tmp_path / "one" / PLAN)
    assert plan.cuts == result.plan.cuts
    graphprune.save(graphprune.replay(model, plan, ids), tmp_path / "two")
    for name in ("model.safetensors", "config.json", PLAN):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_plan_refuses_another_architecture(tmp_path: Path) -> None:
    plan = graphprune.compile(llama(), {"input_ids": tokens()}, keep=0.7).plan
    with pytest.raises(UserMistake, match="another model"):
        graphprune.replay(gpt2(), plan, {"input_ids": tokens()})
    (tmp_path / "broken.json").write_text('{"schema": 1, "cuts": [')
    with pytest.raises(UserMistake, match="not a graphprune plan"):
        graphprune.load_plan(tmp_path / "broken.json")


@pytest.mark.parametrize("build", [llama, gpt2, bert])
def test_layers_that_differ_round_trip_with_and_without_graphprune(build: Any, tmp_path: Path) -> None:
    model, ids = build(), tokens()
    result = graphprune.compile(model, {"input_ids": ids}, keep=0.7, kinds=["head", "ffn"], scope="global", alike=False)
    assert result.pruned.config is None and len({len(cut.kept) for cut in result.plan.cuts if cut.kind == "ffn"}) > 1
    graphprune.save(result, tmp_path / "out")
    auto = transformers.AutoModelForMaskedLM if build is bert else transformers.AutoModelForCausalLM
    for loaded in (graphprune.load(tmp_path / "out"), auto.from_pretrained(tmp_path / "out", trust_remote_code=True)):
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(ids).logits, result.model(ids).logits)
    if build is not bert:
        written = [
            m.generate(ids, max_new_tokens=5, do_sample=False, use_cache=c) for m, c in ((loaded, True), (result.model, False))
        ]
        assert torch.equal(*written)


def same_everywhere(model: Any, folder: Path) -> None:
    """What a stranger, the package and the command line load computes what the model does."""
    ids = tokens()
    code = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for loaded in (graphprune.load(folder), graphprune.open_source(folder).model, code):
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)


def test_a_model_whose_layers_differ_is_a_model(tmp_path: Path) -> None:
    """It is opened, pruned again, made sparse and saved like any other, from files and in memory."""
    model, ids = llama(layers=4), {"input_ids": tokens()}
    first = graphprune.compile(model, ids, keep=0.7, kinds=["ffn"], scope="global", alike=False)
    assert first.pruned.config is None and not hasattr(model.config, "pruned")
    graphprune.save(first, tmp_path / "first")
    opened = graphprune.open_source(tmp_path / "first")
    assert type(opened.model) is type(model)
    second = graphprune.compile(opened.model, ids, keep=0.7, kinds=["head"], alike=False, protect=["model.layers.1"])
    third = graphprune.compile(second.model, ids, keep=0.7, kinds=["layer"])
    for name, result in (("second", second), ("third", third)):
        same_everywhere(result.model, graphprune.save(result, tmp_path / name))
    assert len(third.model.model.layers) < 4
    code = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True).eval()
    again = graphprune.compile(code, ids, keep=0.9, kinds=["ffn"])
    same_everywhere(again.model, graphprune.save(again, tmp_path / "again"))
    sparse = graphprune.sparsify(third.model, None, method="magnitude", example_inputs=ids)
    source = graphprune.open_source(tmp_path / "third")
    same_everywhere(sparse, save_model(sparse, tmp_path / "sparse", source))
    meta = graphprune.open_source(tmp_path / "third", weights=False).model
    shapes = {name: tuple(tensor.shape) for name, tensor in third.model.named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in meta.named_parameters()} == shapes
    with pytest.raises(ModelLimit, match="pruned before"):
        graphprune.compile_streamed(tmp_path / "third", tmp_path / "streamed")


def test_buffers_that_a_class_computes_stay_as_they_were_cut(tmp_path: Path) -> None:
    """Fewer rotary pairs: transformers would fill the table of frequencies from the config."""
    ids = {"input_ids": tokens()}
    first = graphprune.compile(llama(layers=4), ids, keep=0.5, kinds=["qk_width", "value_width"], alike=False)
    assert len(first.model.model.rotary_emb.inv_freq) < len(llama().model.rotary_emb.inv_freq)
    same_everywhere(first.model, graphprune.save(first, tmp_path / "first"))
    second = graphprune.compile(graphprune.load(tmp_path / "first"), ids, keep=0.7, kinds=["layer"])
    same_everywhere(second.model, graphprune.save(second, tmp_path / "second"))


@pytest.mark.parametrize("told", [True, False], ids=["by the other layers", "by running with a cache"])
def test_a_layer_whose_number_equals_a_size_keeps_its_number(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not told:
        monkeypatch.setattr(module, "coincidences", lambda model, axes: set())
    model, ids = llama(layers=8), tokens()
    protected = {"keep": 0.6, "kinds": ["head"], "alike": False, "protect": ["model.layers.0"]}
    smaller = graphprune.compile(model, {"input_ids": ids}, **protected).model
    assert {layer.self_attn.q_proj.out_features for layer in smaller.model.layers[1:]} < {8, 16, 32}
    assert [layer.self_attn.layer_idx for layer in smaller.model.layers] == list(range(8))
    with_cache, without = (smaller.generate(ids, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(with_cache, without)


def test_dtype_is_kept(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    graphprune.save(graphprune.compile(model, {"input_ids": tokens()}, keep=0.7), tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_plain_module_round_trips(tmp_path: Path) -> None:
    model, x = residual(), torch.randn(2, 3, 8, 8)
    result = graphprune.compile(model, x, keep=0.6)
    graphprune.save(result, tmp_path / "out")
    loaded = graphprune.load(tmp_path / "out", sharpened(Residual(), seed=9))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.model(x))
    with pytest.raises(UserMistake, match="plain module"):
        graphprune.load(tmp_path / "out")


class Versioned(nn.Linear):
    """A layer that asks which version of itself wrote a state, as torch's own do."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *others: Any) -> None:
        assert metadata["version"] == 2
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_a_plain_module_is_told_the_versions_of_its_layers(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(Versioned(6, 8), nn.ReLU(), nn.Linear(8, 3))

    result = graphprune.compile(build(), torch.randn(2, 6), keep=0.5)
    graphprune.save(result, tmp_path / "out")
    assert graphprune.load(tmp_path / "out", build())[0].out_features == 4


class Silent(nn.Sequential):
    """A model whose own way to load returns nothing, as some have it."""

    def load_state_dict(self, *given: Any, **named: Any) -> Any:
        super().load_state_dict(*given, **named)


def test_a_plain_module_loads_its_own_way_and_another_is_refused(tmp_path: Path) -> None:
    def build(*more: nn.Module) -> nn.Module:
        return Silent(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), *more)

    result = graphprune.compile(build(), x := torch.randn(2, 6), keep=0.5)
    graphprune.save(result, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(graphprune.load(tmp_path / "out", build())(x), result.model(x))
    with pytest.raises(UserMistake, match="holds another model"):
        graphprune.load(tmp_path / "out", build(nn.Linear(3, 3)))


class Unusual(nn.Module):
    """A state that is not all tensors, a buffer inside another, and complex angles that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.arange(1.0, 4.0))
        self.register_buffer("part", self.scale[:2])
        self.register_buffer("turn", torch.polar(torch.ones(8), torch.arange(8.0)), persistent=False)

    def get_extra_state(self) -> str:
        return "a word"

    def set_extra_state(self, state: str) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.down((self.up(x) * self.turn).real) * self.scale + self.part.sum()


def test_a_plain_module_may_keep_what_no_file_of_tensors_holds(tmp_path: Path) -> None:
    x, like = torch.randn(2, 6), Unusual()
    like.scale[0] = 9.0
    result = graphprune.compile(sharpened(Unusual()), x, keep=0.5)
    graphprune.save(result, tmp_path / "out")
    loaded = graphprune.load(tmp_path / "out", like)
    assert loaded.turn.shape == (4,)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.model(x))


def test_a_graph_is_saved_as_an_exported_program(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    result = graphprune.compile(residual(), x, keep=0.6, emit="graph")
    graphprune.save(result, tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), result.model(x))


def test_nothing_is_written_over_or_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = graphprune.compile(llama(), {"input_ids": tokens()}, keep=0.7)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(UserMistake, match="not empty"):
        graphprune.save(result, tmp_path / "full")

    def no_space(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(result.model), "save_pretrained", no_space)
    with pytest.raises(ModelLimit, match="could not be written"):
        graphprune.save(result, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_checkpoint_that_reloads_differently_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that recomputes something at load time must not slip through."""
    result = graphprune.compile(llama(), {"input_ids": tokens()}, keep=0.7)
    original = record.save_transformers

    def tampered(model: Any, folder: Path) -> None:
        original(model, folder)
        config = json.loads((folder / "config.json").read_text())
        config["rms_norm_eps"] = 0.5
        (folder / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr("graphprune.output.save_transformers", tampered)
    with pytest.raises(ModelLimit, match="does not compute"):
        graphprune.save(result, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_whose_layers_differ_saves_itself_whole(tmp_path: Path) -> None:
    ids = {"input_ids": tokens()}
    result = graphprune.compile(llama(), ids, keep=0.6, method="random", alike=False, scope="global")
    assert result.pruned.config is None
    graphprune.save(result, tmp_path / "ours")
    copies = {"in memory": result.model, "copied": copy.deepcopy(result.model), "loaded": graphprune.load(tmp_path / "ours")}
    for factor, (name, model) in enumerate(copies.items(), 2):
        model.lm_head.weight.data.mul_(factor)
        model.save_pretrained(tmp_path / name)
        opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, trust_remote_code=True)
        torch.testing.assert_close(opened(**ids).logits, model(**ids).logits)
    again = graphprune.compile(copies["loaded"], ids, keep=0.8, method="random")
    again.model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(graphprune.load(tmp_path / "again")(**ids).logits, again.model(**ids).logits)


def test_a_program_of_keywords_takes_other_sizes(tmp_path: Path) -> None:
    result = graphprune.compile(llama(), {"input_ids": tokens()}, method="magnitude", emit="graph")
    graphprune.save(result, tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "model.pt2").module()
    for shape in ((5, 7), (2, 29)):
        ids = torch.randint(0, 101, shape)
        with torch.no_grad():
            torch.testing.assert_close(program(input_ids=ids).logits, result.model(input_ids=ids).logits)
    assert "forward" not in vars(result.model)


class OwnConfig(transformers.PretrainedConfig):
    model_type = "own_of_a_test"

    def __init__(self, hidden: int = 16, wide: int = 32, **others: Any) -> None:
        self.hidden, self.wide = hidden, wide
        super().__init__(**others)


class Own(transformers.PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.up, self.down = nn.Linear(config.hidden, config.wide), nn.Linear(config.wide, config.hidden)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())  # type: ignore[no-any-return]


def test_a_class_of_ones_own_is_saved_and_loaded_by_that_class(tmp_path: Path) -> None:
    result = graphprune.compile(Own(OwnConfig()), {"x": torch.randn(3, 16)}, method="magnitude", keep=0.5)
    graphprune.save(result, tmp_path / "out")
    assert Own.from_pretrained(tmp_path / "out").up.weight.shape == result.model.up.weight.shape == (16, 16)


class OwnStack(transformers.PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config: OwnConfig) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(Own(config) for _ in range(2))
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_a_class_of_ones_own_whose_layers_differ_is_loaded_by_its_record(tmp_path: Path) -> None:
    x = torch.randn(3, 16)
    result = graphprune.compile(OwnStack(OwnConfig()), {"x": x}, method="magnitude", keep=0.7, protect=["blocks.0"], alike=False)
    assert result.pruned.config is None
    graphprune.save(result, tmp_path / "out")
    loaded = graphprune.load(tmp_path / "out")
    assert type(loaded) is OwnStack
    assert torch.equal(loaded(x), result.model(x))
    assert not list((tmp_path / "out").glob("*.py")), "no code that could not import the class"


@pytest.mark.parametrize("out", [".", "link"])
def test_an_output_that_cannot_appear_at_once_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty" if out == "." else tmp_path)
    with pytest.raises(UserMistake, match="cannot be the output"):
        check_free(out)
