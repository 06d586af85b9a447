"""Facts about the tree: imports go one way, recipes and options hold together."""

import ast
import importlib
import runpy
import subprocess
import sys

import pytest

from nanochat.training import WATCHING
from tests.helpers import ROOT, dry_run

ALLOWED = {
    "nanochat": {"nanochat", "rustbpe"},
    "tasks": {"tasks", "nanochat"},
    "megacontext": {"megacontext", "nanochat"},
    "scripts": {"scripts", "tasks", "nanochat", "megacontext"},
}
OURS = {"nanochat", "tasks", "scripts", "megacontext", "rustbpe", "tests", "dev"}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [node.module]
            for name in names:
                top = name.split(".")[0]
                assert top not in OURS - ALLOWED[package], f"{path} imports {name}"


def test_test_modules_share_by_helpers_alone():
    """What two of them need is in helpers*.py, a reference_*.py or a fixture of conftest.py, by one spelling."""
    for path in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not any(name.removeprefix("tests.").startswith(("test_", "conftest")) for name in names), path


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_script_explains_itself(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert not end.value.code
    assert "options" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_option_is_read(path):
    config = importlib.import_module(f"scripts.{path.stem}").Config
    source = path.read_text("utf-8")
    if hasattr(config, "__dataclass_fields__") and "Training(" in source:
        source += (ROOT / "nanochat" / "training.py").read_text("utf-8")
    if "attach(" in source:
        source += (ROOT / "megacontext" / "attach.py").read_text("utf-8")
    if "pretrained." in source:
        source += (ROOT / "nanochat" / "pretrained.py").read_text("utf-8")
    for name in config.__dataclass_fields__:
        assert f"config.{name}" in source or f'config, "{name}"' in source, name


def test_watching_names_options():
    """What is left out of the comparison of a resumed run's settings must be an option of some stage."""
    stages = ("base_train", "mid_train", "chat_sft", "chat_rl", "mc_train")
    names = {
        name for stage in stages for name in importlib.import_module(f"scripts.{stage}").Config.__dataclass_fields__
    }
    assert names >= WATCHING


@pytest.mark.parametrize(
    ("script", "depth", "shards"),
    [("speedrun.sh", "--depth=20", "-n 240"), ("run1000.sh", "--depth=32", "-n 800")],
)
def test_recipes_of_eight_gpus(script, depth, shards):
    out = dry_run(script, "--matrix_lr", "0.03")
    assert f"torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- {depth}" in out
    assert "--matrix_lr 0.03" in out
    assert shards in out
    order = [
        "report reset",
        "nanochat.dataset -n 8",
        "tok_train",
        "gen_synthetic_data",
        "scripts.prepare",
        "base_train",
        "base_loss",
        "base_eval",
        "mid_train",
        "chat_eval -- -i mid",
        "chat_sft",
        "chat_eval -- -i sft",
        "report generate",
    ]
    places = [out.index(part) for part in order]
    assert places == sorted(places)


def test_wandb_is_checked_first():
    out = dry_run("speedrun.sh", "--wandb", "mine")
    assert out.index("scripts.prepare --tasks=none --run=mine") < out.index("report reset") < out.index("base_train")
    assert "--tasks=none" not in dry_run("speedrun.sh")


def test_profiles_of_run10():
    cpu = dry_run("run10.sh", "--gpu", "cpu")
    assert "--source stdlib" in cpu
    assert "--extra cpu" in cpu
    for profile in ("5090", "h100"):
        out = dry_run("run10.sh", f"--gpu={profile}")
        assert "--extra gpu" in out
        assert "torchrun" not in out
    assert "-i rl" not in cpu
    assert "scripts.chat_eval -i rl" in dry_run("run10.sh", "--gpu=cpu", "--rl")
    tagged = dry_run("run10.sh", "--gpu=cpu", "--model_tag", "mine", "--depth=3")
    assert "scripts.base_loss --device_batch_size=16 --split_tokens=262144 --model_tag=mine" in tagged
    bad = subprocess.run(["bash", "run10.sh", "--gpu=abacus"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode != 0
    assert "auto, cpu, 5090 or h100, got 'abacus'" in bad.stderr


def test_no_code_in_the_tree_needs_a_stub():
    for path in [*ROOT.glob("nanochat/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("tasks/*.py")]:
        text = path.read_text("utf-8")
        assert "TODO" not in text, path
        assert "FIXME" not in text, path
