"""The shell scripts: what every bash from macOS's 3.2 on understands, and what the recipes run."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers import ROOT

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
