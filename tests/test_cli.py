"""The command line as a person uses it: in processes of its own, exit codes, one-screen errors, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from graphprune import cli
from tests.models import llama

FACTORY = '''
import torch
from torch import nn

def net():
    """A small net with its example inputs."""
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 3)), torch.randn(4, 6)

def refuses():
    class Branches(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x
    return Branches(), torch.randn(4, 6)
'''


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    llama().save_pretrained(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_compile_inspect_apply(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "compile", checkpoint, "-o", tmp_path / "out", "--keep", 0.7)
    assert code == 0
    assert "from_pretrained loads it" in out
    code, out, _ = run(capsys, "inspect", tmp_path / "out", "--json")
    assert code == 0
    kinds = {row["kind"] for row in json.loads(out)}
    assert {"head", "ffn", "hidden"} <= kinds
    assert {"layer", "branch"} <= kinds
    assert "tensors that feed nothing else" in run(capsys, "inspect", tmp_path / "out", "--explain", "model.layers.0")[1]
    code, out, _ = run(capsys, "apply", tmp_path / "out" / "graphprune_plan.json", checkpoint, "-o", tmp_path / "again")
    assert code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_explain_names_the_line_of_the_model(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", checkpoint, "--explain", "model.layers.1.mlp.up_proj.weight")
    assert code == 0
    assert "modeling_llama.py" in out
    assert "gate_proj" in out


def test_a_factory_and_a_pass_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nets.py").write_text(FACTORY)
    (tmp_path / "mine.py").write_text(
        "import torch\nfrom graphprune import Groups, Scores\n\n"
        "def mine(groups: Groups, *, sign: int = 1) -> Scores:\n"
        "    return Scores({g.name: sign * torch.arange(g.size, dtype=torch.float64) for g in groups}, 'mine')\n"
    )
    method = f"{tmp_path}/mine.py:mine:sign=-1"
    code, _, err = run(capsys, "compile", f"{tmp_path}/nets.py:net", "-o", tmp_path / "out", "--keep", 0.5, "--method", method)
    assert code == 0, err
    plan = json.loads((tmp_path / "out" / "graphprune_plan.json").read_text())
    assert plan["cuts"][0]["kept"].startswith("0-")
    code, _, err = run(capsys, "bench", f"{tmp_path}/nets.py:net", tmp_path / "out")
    assert code == 2 and "graphprune.load(" in err
    (tmp_path / "small.py").write_text(
        f"import graphprune, nets\n\n"
        f"def small():\n    model, inputs = nets.net()\n    return graphprune.load({str(tmp_path / 'out')!r}, model), inputs\n"
    )
    code, out, err = run(capsys, "bench", f"{tmp_path}/nets.py:net", f"{tmp_path}/small.py:small", "--repeats", 1)
    assert code == 0 and "prefill, ideal" in out, err
    code, out, err = run(capsys, "inspect", f"{tmp_path}/small.py:small", "--json")
    assert code == 0 and json.loads(out), err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["compile", "{model}", "-o", "{new}", "--keep", "1.7"], 2, "keep must be above 0"),
        (["compile", "{model}", "-o", "{new}", "--method", "magnitud"], 2, "did you mean magnitude"),
        (["compile", "{model}", "-o", "{full}"], 2, "not empty"),
        (["compile", "{missing}", "-o", "{new}"], 2, ""),
        (["compile", "{broken}", "-o", "{new}"], 1, ""),
        (["compile", "{net}:refuses", "-o", "{new}"], 1, "if x.sum() > 0"),
        (["compile", "{model}", "-o", "{new}", "--keep", "0.01", "--kinds", "ffn", "--minimum", "80"], 1, "out of reach"),
        (["inspect", "{model}", "--explain", "model.layers.0.mlp.up_prj.weight"], 2, "did you mean"),
        (["apply", "{missing}", "{model}", "-o", "{new}"], 2, "no plan"),
        (["compile"], 2, "Usage"),
    ],
)
def test_mistakes(
    arguments: list[str], code: int, says: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: tmp_path / name for name in ("new", "full", "missing", "broken", "net")} | {"model": checkpoint}
    places["full"].mkdir()
    (places["full"] / "x").write_text("mine")
    places["broken"].mkdir()
    (places["broken"] / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    (places["broken"] / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    places["net"] = tmp_path / "nets.py"
    places["net"].write_text(FACTORY)
    found, _, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert found in ((1, 2) if not says else (code,)), err
    assert says in err
    assert "Traceback" not in err
    assert len(err.splitlines()) < 30
    assert not places["new"].exists()
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


COMMANDS: dict[str, Any] = vars(typer.main.get_command(cli.app))["commands"]


def plain(text: str) -> str:
    """As rich shows it: an escaped bracket is none of its markup."""
    return " ".join(text.replace("\\[", "[").split())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_and_what_every_option_is_for(name: str) -> None:
    shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert shown.exit_code == 0
    said = plain(shown.stdout)
    assert plain(COMMANDS[name].help) in said
    given = [parameter for parameter in COMMANDS[name].params if parameter.name != "help"]
    assert [parameter.name for parameter in given if not parameter.help or plain(parameter.help) not in said] == []
    assert [flag for parameter in given for flag in parameter.opts if flag.startswith("--") and flag not in said] == []
