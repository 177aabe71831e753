"""What a person may get wrong is told, with what to do, before anything runs; what was meant is not lost on the way."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from accelerate import cpu_offload
from torch import nn

import graphprune
from graphprune import Budget, Scores, compile, couple, disk, propagate, trace
from graphprune.bench import figures
from graphprune.default import default_for
from graphprune.errors import UserMistake
from graphprune.evaluate import perplexity
from graphprune.examples import read_examples
from graphprune.pipeline import find_pass
from graphprune.plan import load_plan
from graphprune.recover import Recipe, recover
from graphprune.replay import replay
from graphprune.rewrite import stream
from graphprune.rewrite.folder import check_free, complete_or_nothing
from graphprune.rewrite.record import RECORD
from graphprune.streamed import compile_streamed
from graphprune.written import written
from tests.models import bert, llama, tokens


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 48), nn.ReLU(), nn.Linear(48, 3))


X = torch.randn(5, 6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"round_to": 0}, "round_to cannot be 0"),
        ({"round_to": {"fnn": 16}}, "did you mean ffn"),
        ({"minimum": -3}, "minimum cannot be -3"),
        ({"minimum": {"ffn": 0}}, "minimum cannot be 0"),
        ({"protect": ["2.weigth"]}, "did you mean 2.weight"),
    ],
)
def test_a_budget_that_says_nothing_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserMistake, match=said):
        compile(net(), X, keep=0.5, **settings)


def test_a_width_without_a_smaller_multiple_is_left_alone_and_fewer_heads_than_it_are_not() -> None:
    with pytest.raises(graphprune.errors.ModelLimit, match="out of reach"):
        compile(net(), X, keep=0.8, round_to=64)
    cuts = compile(llama(), keep=0.7, round_to=64).plan.cuts
    assert {len(cut.kept) for cut in cuts if cut.kind == "ffn"} == {64}
    assert {len(cut.kept) for cut in cuts if cut.kind == "head"} < {1, 2}


def test_a_bound_pass_takes_further_options_and_the_seed() -> None:
    bound = find_pass("magnitude", aggregate="max")
    assert compile(net(), X, keep=0.5, method=bound, options={"p": 1}).plan.method == "magnitude p=1 max"
    by_name, by_pass = (compile(net(), X, keep=0.5, method=method, seed=3).facts[Scores] for method in ("random", find_pass("random")))
    other = compile(net(), X, keep=0.5, method="random", seed=4).facts[Scores]
    told = [find_pass("random", seed=3), "random:seed=3"]
    said = [compile(net(), X, keep=0.5, method=method, seed=4).facts[Scores] for method in told]
    assert all(torch.equal(units, one[name]) for one in said for name, units in by_name.units.items())
    for name, units in by_name.units.items():
        assert torch.equal(units, by_pass[name]) and not torch.equal(units, other[name])


def test_a_pass_file_is_imported_as_a_module_and_says_what_it_lacks(tmp_path: Path) -> None:
    begin = "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom torch import nn\nfrom graphprune import *\n"
    (tmp_path / "typed.py").write_text(
        f"{begin}@dataclass\nclass Weights:\n    own: dict[str, object]\n"
        "def typed(model: nn.Module, groups: Groups) -> Scores:\n"
        "    own = Weights(dict(model.named_parameters())).own\n"
        "    return score(groups, groups.axes.tensors, own.get, method='typed')\n"
    )
    assert compile(net(), X, keep=0.5, method=str(tmp_path / "typed.py")).plan.method == "typed"
    for name, source, said in (
        ("silent", "def silent(model: nn.Module, groups: Groups): ...", "does not say what it makes"),
        ("bare", "def bare(model, groups: Groups) -> Scores: ...", "does not say of what type model is"),
        ("broken", "import nothing_like_it", "does not import"),
        ("unknown", "def unknown(model: nn.Module, groups: Gruops) -> Scores: ...", "names an unknown type"),
    ):
        (tmp_path / f"{name}.py").write_text(f"{begin}{source}\n")
        with pytest.raises(UserMistake, match=said):
            find_pass(str(tmp_path / f"{name}.py"))


def test_a_plan_is_held_to_the_groups_it_names(tmp_path: Path) -> None:
    plan = compile(net(), X, keep=0.5).plan
    groups = couple(propagate(trace(net(), X)))
    (cut,) = plan.cuts
    for wrong, said in (
        (replace(cut, group="elsewhere"), "there is no such group"),
        (replace(cut, size=47), "48 units, 47 in the plan"),
        (replace(cut, kept=(0, 999)), "keeps no units 0 to 47"),
        (replace(cut, kept=(3, 2)), "in order"),
        (replace(cut, kept=()), "keeps no units"),
    ):
        with pytest.raises(UserMistake, match=said):
            replace(plan, cuts=(wrong,)).keep(groups)
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json").keep(groups) == plan.keep(groups)


@pytest.mark.parametrize("config", ["{}", '{"architectures": null}', '{"architectures": []}', '{"architectures": ["NoSuchModel"]}'])
def test_a_directory_of_no_known_class_is_not_loaded(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserMistake, match=r"is not a checkpoint|NoSuchModel"):
        graphprune.load(tmp_path, net())


def test_a_damaged_index_is_told(tmp_path: Path) -> None:
    (tmp_path / disk.INDEX).write_text('{"weight_map": ')
    with pytest.raises(UserMistake, match="half a checkpoint"):
        disk.Checkpoint(tmp_path)


def test_a_file_does_not_say_what_to_import(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({"class": "this.Zen"}))
    with pytest.raises(UserMistake, match=r"this\.Zen"):
        graphprune.load(tmp_path)
    assert "this" not in sys.modules


def test_too_few_rows_of_calibration_are_told() -> None:
    ids = {"input_ids": tokens()}
    for method in ("wanda_sp", "flap", "obs"):
        with pytest.raises(UserMistake, match="too few calibration rows"):
            compile(llama(), ids, keep=0.8, method=method, calibration=[{"input_ids": tokens()[:2]}])


def test_a_training_ends_and_has_something_to_learn() -> None:
    with pytest.raises(UserMistake, match="never end"):
        Recipe(epochs=None)

    class Letters:
        eos_token_id = 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) % 50 for letter in text]}

    with pytest.raises(UserMistake, match="nothing to learn"):
        read_examples([], Letters(), 16)
    with pytest.raises(UserMistake, match="the text has 12 tokens"):
        read_examples(["a few words"], Letters(), 64)
    (whole,) = read_examples(["a few words"], Letters(), 12)
    assert len(whole.ids) == len("a few words") + 1
    assert [len(example.ids) for example in read_examples(["some more words " * 3], Letters(), 16)] == [16, 16, 16]


def test_an_error_while_reading_is_not_taken_for_one_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), complete_or_nothing(tmp_path / "out"):
        (tmp_path / "corpus.txt").read_text()
    with pytest.raises(graphprune.errors.ModelLimit, match="could not be written"), complete_or_nothing(tmp_path / "out") as folder:
        (folder / "no" / "such" / "place").write_text("")


def test_weights_in_other_forms_are_not_copied(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    for name in ("tf_model.h5", "flax_model.msgpack", "model.onnx", "tokenizer.json", "pytorch_model.bin"):
        (tmp_path / "model" / name).write_text("")
    stream.copy_rest(tmp_path / "model", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["tokenizer.json"]


def test_a_compile_leaves_the_callers_draws_alone() -> None:
    torch.manual_seed(7)
    compile(net(), X, keep=0.5, seed=1)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    net()
    assert torch.equal(drawn, torch.rand(3))


def test_synflow_goes_down_to_a_target_in_rounds() -> None:
    budget = Budget(target={"parameters": 0.4})
    groups = couple(propagate(trace(model := net(), X)))
    units = find_pass("synflow", rounds=4).function(model, groups, budget, rounds=4)["0:ffn"]
    assert sorted(set(units[units < 0].tolist())) == [-3.0, -2.0, -1.0]


def scored(units: Any) -> Any:
    def given(model: nn.Module, groups: graphprune.Groups) -> Scores:
        return Scores({group.name: units(group) for group in groups}, "mine")

    return given


@pytest.mark.parametrize(
    ("units", "said"),
    [
        (lambda group: torch.full((group.size,), torch.nan), "48 of 48 units of 0:ffn no number"),
        (lambda group: torch.cat([torch.zeros(group.size - 1), torch.tensor([torch.nan])]), "1 of 48 units"),
        (lambda group: torch.zeros(group.size + 1), r"they are \(49,\)"),
        (lambda group: torch.zeros(group.size, 2), r"they are \(48, 2\)"),
        (lambda group: torch.zeros(group.size, dtype=torch.long), "torch.int64"),
        (lambda group: [0.0] * group.size, "they are list"),
    ],
)
def test_scores_are_one_number_a_unit(units: Any, said: str) -> None:
    with pytest.raises(UserMistake, match=said):
        compile(net(), X, keep=0.5, method=scored(units))
    compile(net(), X, keep=0.5, method=scored(lambda group: torch.arange(group.size).float().where(torch.arange(48) != 3, torch.inf)))


def test_what_a_pass_gives_is_what_it_says() -> None:
    def none(model: nn.Module, groups: graphprune.Groups) -> Scores:
        return Scores({}, "none")

    def nothing(model: nn.Module, groups: graphprune.Groups) -> Scores:
        return None  # type: ignore[return-value]

    def turned(model: nn.Module, groups: graphprune.Groups) -> Scores:
        weights = dict(model.named_parameters())
        return graphprune.score(groups, groups.axes.tensors, lambda name: weights[name].T, method="turned")

    for method, said in ((none, "there are none"), (nothing, "gave a NoneType"), (turned, "a saliency of shape")):
        with pytest.raises(UserMistake, match=said):
            compile(net(), X, keep=0.5, method=method)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"keep": "0.5"}, "keep must be"),
        ({"kinds": "ffn"}, r"kinds=\['ffn'\]"),
        ({"protect": "0"}, r"protect=\['0'\]"),
        ({"passes": [None]}, "NoneType is no pass"),
        ({"method": 3}, "int is no pass"),
        ({"target": {"kv": 0.5}}, "has no kv to save"),
        ({"method": "taylor", "calibration": [X]}, "a calibration batch is a Tensor"),
    ],
)
def test_arguments_of_another_kind_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserMistake, match=said):
        compile(net(), X, **{"keep": 0.5, **wrong})
    with pytest.raises(UserMistake, match="is no model"):
        compile(len, X)  # type: ignore[arg-type]


def test_a_model_without_anything_to_prune_says_why() -> None:
    with pytest.raises(graphprune.errors.ModelLimit, match="nothing in Linear can be pruned"):
        compile(nn.Linear(6, 3), X, keep=0.5)


def test_gradients_are_of_a_loss_that_is_given() -> None:
    y = torch.tensor([0, 1, 2, 0, 1])

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch["input"]), batch["y"])

    model, batches = net(), [{"input": X, "y": y}]
    for method in ("taylor", "fisher", "snip", "llm_pruner:order=vector", "llm_pruner:order=mixed"):
        assert compile(model, X, keep=0.5, method=method, calibration=batches, loss=loss).plan.cuts
        with pytest.raises(graphprune.errors.ModelLimit, match=r"loss=f"):
            compile(model, X, keep=0.5, method=method, calibration=[{"input": X}])
    found = compile(model, X, keep=0.5, method="taylor", calibration=batches, loss=loss).facts[Scores]["0:ffn"]
    loss(model, batches[0]).backward()
    weights = {name: (p.detach() * p.grad).abs().double() for name, p in model.named_parameters()}
    torch.testing.assert_close(found, weights["0.weight"].sum(1) + weights["0.bias"] + weights["2.weight"].sum(0))


class Auxiliary(nn.Module):
    """A second head, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.aside = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.up(x).relu()
        return (self.down(x), self.aside(x)) if self.training else self.down(x)


def test_widths_that_code_for_training_may_have_are_left_alone() -> None:
    with pytest.raises(graphprune.errors.ModelLimit, match="nothing in Auxiliary can be pruned"):
        compile(Auxiliary().eval(), X, keep=0.5)
    graph = compile(Auxiliary().eval(), X, keep=0.5, emit="graph")
    assert [len(cut.kept) for cut in graph.plan.cuts] == [8]
    wider = Auxiliary().eval()
    wider.aside = nn.Linear(5, 3)
    result = compile(wider, X, keep=0.5)
    assert any("aside.weight" in note for note in result.notes) and result.plan.cuts
    assert not compile(net(), X, keep=0.5).notes


def test_a_stream_that_another_part_writes_into_stays_as_wide() -> None:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = transformers.LlamaConfig(
        vocab_size=99, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)).eval()
    images = {"input_ids": torch.tensor([[1, *[5] * 16, 7, 8]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    for kinds in (None, ["ffn", "hidden"]):
        result = compile(model, {"input_ids": torch.arange(6, 18)[None]}, keep=0.7, kinds=kinds)
        assert {cut.kind for cut in result.plan.cuts} <= {"head", "ffn"}
        assert result.model(**images).logits.shape == (1, 19, 99)


class Hidden(nn.Module):
    """One group whose size stands in the code, one that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.other = nn.Linear(6, 16), nn.Linear(10, 3), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up(x).relu()
        return self.one(x[..., :10]) + self.other(x[..., 10:])


def test_a_budget_out_of_reach_says_what_the_code_hides() -> None:
    with pytest.raises(graphprune.errors.ModelLimit, match='emit="graph" would cut them'):
        compile(Hidden(), X, keep=0.5)


def test_only_a_method_scores() -> None:
    for name in ("protect_ends", "least_squares"):
        with pytest.raises(UserMistake, match=f"{name} is no method"):
            compile(net(), X, keep=0.5, method=name)


def test_a_language_model_without_text_is_told_what_it_loses() -> None:
    assert any("magnitude looks at weights alone" in note for note in compile(llama(), keep=0.8).notes)
    assert not any("magnitude looks" in note for note in compile(llama(), keep=0.8, method="magnitude").notes)
    assert default_for(llama(), True, streamed=True).method == "flap"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers under an old name
def test_what_is_behind_a_compiled_model_is_compiled_and_adapters_and_quantised_weights_are_not() -> None:
    result = compile(torch.compile(llama()), keep=0.8)
    assert type(result.model) is type(llama()) and result.pruned.config is not None
    adapted = llama()
    adapted.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    for held in (adapted, peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))):
        with pytest.raises(UserMistake, match="adapter"):
            compile(held, keep=0.8)
    quantised = llama()
    quantised.config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserMistake, match=r"quantised \(gptq\)"):
        compile(quantised, keep=0.8)
    with pytest.raises(UserMistake, match="offloaded"):
        compile(cpu_offload(llama()), keep=0.8)
    hidden = llama()
    hidden.set_attn_implementation("flex_attention")
    with pytest.raises(UserMistake, match="flex_attention"):
        replay(hidden, result.plan)
    with pytest.raises(UserMistake, match="holds no batch"):
        compile(llama(), keep=0.8, calibration=[])


def test_a_quantised_checkpoint_is_not_streamed(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    with pytest.raises(UserMistake, match="quantised"):
        graphprune.compile_streamed(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_what_reads_from_left_to_right_has_a_perplexity() -> None:
    def words(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 50 for letter in text]}

    def measured(model: nn.Module, length: int = 16) -> float:
        return perplexity(model, words, ["some text " * 9], length=length).value

    assert measured(llama()) > 1
    for dtype in (torch.bfloat16, torch.float16):
        assert measured(llama().to(dtype)) > 1
    with pytest.raises(UserMistake, match="depend on the tokens after"):
        measured(bert())
    with pytest.raises(UserMistake, match="continues none"):
        measured(transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=99, d_model=16, d_ff=16, num_layers=1)))
    with pytest.raises(UserMistake, match="reads at most 20"):
        measured(llama(max_position_embeddings=20), 32)


def test_a_plan_tells_which_passes_it_cannot_say(tmp_path: Path) -> None:
    text = [{"input_ids": tokens()}]
    result = compile(llama(), keep=0.8, method="flap", calibration=text, passes=["least_squares:damping=1"])
    result.plan.save(tmp_path / "graphprune_plan.json")
    plan = load_plan(tmp_path)
    assert plan.options["passes"] == ["least_squares"]
    assert any("least_squares" in note for note in graphprune.replay(llama(), plan).notes)
    assert "passes" not in compile(llama(), keep=0.8, method="magnitude").plan.options


def test_where_nothing_can_be_written_nothing_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserMistake, match="cannot be written"):
        check_free(tmp_path / "file" / "out")
    assert check_free(tmp_path / "a" / "b") == tmp_path / "a" / "b"


def vit() -> Any:
    config = transformers.ViTConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    return transformers.ViTForImageClassification(config).eval()


def test_models_of_two_kinds_are_not_timed_on_one_input() -> None:
    with pytest.raises(UserMistake, match="vit does not run on what all are timed on"):
        figures({"llama": llama(), "vit": vit()}, {"input_ids": tokens()}, repeats=1)


def test_what_reads_no_tokens_teaches_no_text_and_writes_none() -> None:
    with pytest.raises(UserMistake, match="the teacher is no causal language model"):
        recover(llama(), [{"input_ids": tokens()}], teacher=vit())
    config = transformers.Wav2Vec2Config(vocab_size=32)
    with torch.device("meta"):
        model = transformers.Wav2Vec2ForCTC(config)
    with pytest.raises(UserMistake, match="Wav2Vec2ForCTC writes no text"):
        written(model, config, samples=2, length=8)


@pytest.mark.parametrize("settings", [{"minutes": 0}, {"steps": 0}, {"batch": 0}, {"epochs": -1}, {"length": 1}, {"distill": 2}], ids=str)
def test_a_training_setting_out_of_range_is_named(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(UserMistake, match=f"^{name} is {value}"):
        recover(llama(), [{"input_ids": tokens()}], **settings)


def test_a_method_is_no_pass_beside_another() -> None:
    batches = [{"input_ids": tokens(seed)} for seed in range(2)]
    with pytest.raises(UserMistake, match="taylor is a method") as error:
        compile(llama(), keep=0.8, method="magnitude", passes=["taylor"], calibration=batches)
    assert "replace those of magnitude" in str(error.value)


def test_a_stream_takes_no_plan_for_layers(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "whole")
    plan = compile(llama(), keep=0.5, method="magnitude", kinds=["layer"]).plan
    with pytest.raises(UserMistake, match="removed in memory"):
        compile_streamed(str(tmp_path / "whole"), tmp_path / "smaller", plan=plan)
    assert not (tmp_path / "smaller").exists()
