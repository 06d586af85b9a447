"""The shell scripts: what every bash from macOS's 3.2 on understands, and what the recipes run."""

import os
import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from nanochat.options import DeviceOptions, TrainingOptions
from tests.helpers import ROOT, dry_run
from tests.step_memory import RESERVE, step_memory

SCRIPTS = [
    "mc_setup",
    "run10.sh",
    "speedrun.sh",
    "run1000.sh",
    "dev/recipe.sh",
    "dev/runcpu.sh",
    "dev/test.sh",
    ".ci/run",
]
NEWER_THAN_3_2 = {
    "an associative array": r"\b(declare|local|typeset)\s+-\w*A",
    "a reference to a name": r"\b(declare|local|typeset)\s+-\w*n\b",
    "a negative index": r"\[-\d+\]",
    "a change of case": r"\$\{\w+(,|\^)",
    "an operator on a value": r"\$\{\w+@",
    "a new builtin": r"\b(mapfile|readarray|coproc)\b",
    "a new redirection": r"&>>|\|&",
    "a new end of a case": r";;?&",
    "a group in a regular expression": r"=~ [^\]]*\(",
    # `set -u` takes an empty array for an unset name before 4.4
    "an array that may be empty": r"(?<!\[@\]\+)\"\$\{(?!SETTINGS)\w+\[@\]\}",
}
OLD_BASH = os.environ.get("BASH_3_2", "/bin/bash")


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_that_bash_3_2_does_not_know(script):
    code = re.sub(r"(?m)(^|\s)#.*", "", (ROOT / script).read_text("utf-8"))
    found = {what: re.search(pattern, code) for what, pattern in NEWER_THAN_3_2.items()}
    assert {what: match[0] for what, match in found.items() if match} == {}


@pytest.mark.parametrize(
    "line",
    ["declare -A VALUES", '[[ "${EXTRA[-1]}" != *=* ]]', "[[ $1 =~ ^(0|1)$ ]]", 'run "${EXTRA[@]}"', "echo ${name,,}"],
)
def test_what_was_wrong_would_be_found(line):
    assert any(re.search(pattern, line) for pattern in NEWER_THAN_3_2.values())


def is_3_2(bash):
    return Path(bash).exists() and b"version 3.2" in subprocess.run([bash, "--version"], capture_output=True).stdout


@pytest.mark.skipif(not is_3_2(OLD_BASH), reason="needs a bash 3.2: macOS's /bin/bash, or BASH_3_2=<path>")
@pytest.mark.parametrize(
    "command",
    [
        "speedrun.sh --depth=26 --device_batch_size 16 --shards 450 --mc --mc_tree ram",
        "run1000.sh --rl --mc off --nnodes=2 --node_rank=1 --master_addr=head",
        "run10.sh --gpu cpu --mc",
        "run10.sh --gpu=h100",
        "dev/runcpu.sh --resume=0",
    ],
)
def test_recipes_in_bash_3_2(command, tmp_path):
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path)}
    run = [
        subprocess.run([bash, *command.split(), "--dry-run"], cwd=ROOT, env=env, capture_output=True, text=True)
        for bash in (OLD_BASH, "bash")
    ]
    assert run[0].returncode == 0, run[0].stderr
    assert run[0].stdout == run[1].stdout


@pytest.mark.parametrize(("recipe", "shards"), [("run10.sh --gpu=h100", 4), ("speedrun.sh", 8), ("run1000.sh", 16)])
def test_the_tokenizer_starts_when_its_shards_are_there(recipe, shards):
    """A shard has 250M characters; what else pretraining needs arrives in the background."""
    out = subprocess.run(["bash", *recipe.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True).stdout
    commands = re.findall(r"\+ (.*?)(?:\x1b|\n)", out)
    data = commands.index(f"python -m nanochat.dataset -n {shards}")
    tokenizer = next(i for i, command in enumerate(commands) if "tok_train" in command)
    assert data < tokenizer
    assert re.search(r"--max_chars=(\d+)", commands[tokenizer])[1] == str(shards * 250_000_000)


CARDS = {"32 GB": 31.3e9, "80 GB": 84.9e9}  # what an RTX 5090 and an H100 report
FITS = {"run10.sh --gpu 5090": "32 GB", "run10.sh --gpu h100": "80 GB", "speedrun.sh": "80 GB", "run1000.sh": "80 GB"}


def pretrains(recipe) -> tuple[int, int]:
    """(depth, device_batch_size) with which a recipe pretrains."""
    found = re.search(r"base_train .*?--depth=(\d+) --device_batch_size=(\d+)", dry_run(*recipe.split()))
    return int(found[1]), int(found[2])


def test_what_fits_is_what_the_recipes_do():
    """The table of memory in the vault: of the recipes as they are, below what each card has, and counted right."""
    page = (ROOT / "obsidian" / "ops" / "Training & Operations.md").read_text("utf-8")
    for recipe, card in FITS.items():
        row = re.search(rf"\| `{re.escape(recipe)}` \| (\d+) \| (\d+) \| {card} \|(.*)\|", page)
        assert tuple(map(int, row.groups()[:2])) == pretrains(recipe)
        assert int(row[3].split("(")[1].strip(" )")) == pretrains(f"{recipe} --compile=off")[1]
        takes = [int(gigabytes) for gigabytes in re.findall(r"(\d+) GB", row[3])]
        assert len(takes) == 3
        assert max(takes) * 1e9 <= CARDS[card]
    counted = step_memory(*pretrains("run10.sh --gpu 5090 --compile=off")) + RESERVE
    assert f"{counted / 1e9:.0f} GB (4)" in re.search(r"`run10.sh --gpu 5090`.*", page)[0]


def stages_of(command):
    """{script: its options} of a recipe."""
    lines = re.findall(r"-m (scripts\.\w+)(.*?)\x1b", dry_run(*command.split()))
    return {script: options.split() for script, options in lines}


@pytest.mark.parametrize("recipe", ["run10.sh --gpu=cpu --rl --mc", "speedrun.sh --rl --mc"])
def test_where_and_how_to_compute_is_for_all_stages(recipe):
    stages = stages_of(f"{recipe} --dtype fp32 --device-type=cpu --compile=off --depth=2")
    computing = {script for script in stages if issubclass(import_module(script).Config, DeviceOptions)}
    assert len(computing) == 8
    for script in computing:
        assert {"--dtype=fp32", "--device_type=cpu"} <= set(stages[script]) or script == "scripts.base_train"
        trains = issubclass(import_module(script).Config, TrainingOptions)
        assert ("--compile=off" in stages[script]) == trains
        assert ("--depth=2" in stages[script]) == (script == "scripts.base_train")
