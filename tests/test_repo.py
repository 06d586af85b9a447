"""Facts about the tree: imports go one way, recipes and options hold together."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "nanochat": {"nanochat", "rustbpe"},
    "tasks": {"tasks", "nanochat"},
    "scripts": {"scripts", "tasks", "nanochat"},
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


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("[a-z]*.py")), ids=lambda p: p.stem)
def test_every_script_explains_itself(path):
    result = subprocess.run(
        [sys.executable, "-m", f"scripts.{path.stem}", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "options" in result.stdout


def test_every_option_of_base_train_is_read():
    source = (ROOT / "scripts" / "base_train.py").read_text()
    from scripts.base_train import WATCHING, Config

    names = set(Config.__dataclass_fields__)
    assert names >= WATCHING
    for name in names:
        assert f"config.{name}" in source, name


def dry_run(script, *args):
    result = subprocess.run(["bash", script, "--dry-run", *args], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stderr
    return result.stdout


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
        "base_train",
        "base_loss",
        "base_eval",
        "report generate",
    ]
    places = [out.index(part) for part in order]
    assert places == sorted(places)


def test_profiles_of_run10():
    cpu = dry_run("run10.sh", "--gpu", "cpu")
    assert "--source stdlib" in cpu
    assert "--extra cpu" in cpu
    for profile in ("5090", "h100"):
        out = dry_run("run10.sh", f"--gpu={profile}")
        assert "--extra gpu" in out
        assert "torchrun" not in out
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
