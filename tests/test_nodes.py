"""Several machines, played by several torchrun agents on this one; the cluster files and the recipes' --nnodes."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.helpers import ROOT, TRAIN, call_script, dry_run, free_port, weights

SHORT = [*TRAIN, "--num_iterations=4", "--eval_every=4", "--sample_every=-1", "--save_every=-1"]


def agents(base_dir, rendezvous, *command):
    """Start two torchrun agents of one process each, wait for both, and return what they printed."""
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    running = [
        subprocess.Popen(
            [*launch, *rendezvous(rank), "-m", *command],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (1, 0)  # the second machine is there first, and waits
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(outputs)[-4000:]
    return outputs


def test_two_machines_equal_one(base):
    """By c10d rendezvous, as by hand, and by the recipes' static one: the same model as one process trains."""
    call_script("base_train", [*SHORT, "--model_tag=one"])
    port = free_port()
    c10d = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test", "--local_addr=127.0.0.1"]
    outputs = agents(base, lambda _rank: c10d, "scripts.base_train", "--", *SHORT, "--model_tag=c10d")
    assert sum("trained 4 steps" in output for output in outputs) == 1  # one of them is the first, and speaks
    one, two = weights(base, "one", 4), weights(base, "c10d", 4)
    differ = [(one[key] - two[key]).abs().mean().item() for key in one]
    assert max(differ) < 2e-3, differ
    assert (base / "base_checkpoints" / "c10d" / "optim_000004_rank1.pt").exists()

    by_recipe = recipe_rendezvous(free_port())
    outputs = agents(base, by_recipe, "scripts.base_train", "--", *SHORT, "--model_tag=static")
    assert "trained 4 steps" not in outputs[0]
    assert "trained 4 steps" in outputs[1]  # the first machine has rank 0
    three = weights(base, "static", 4)
    assert all(two[key].equal(three[key]) for key in two)


def recipe_rendezvous(port):
    """The options for torchrun that a recipe prints, by node rank."""

    def options(rank):
        args = ["--nnodes=2", f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"]
        line = next(line for line in dry_run("speedrun.sh", *args).splitlines() if "scripts.base_train" in line)
        words = line.split(" -m ")[0].split()
        return [word for word in words if re.match("--(node_rank|master|rdzv)", word)]

    return options


# ---------------------------------------------------------------------------------------------------------
# Recipes


@pytest.mark.parametrize("script", ["speedrun.sh", "run1000.sh"])
def test_the_first_machine_does_what_is_of_one_process(script):
    args = ["--nnodes=3", "--master_addr=head", "--rl"]
    first = dry_run(script, *args)
    other = dry_run(script, *args, "--node-rank", "2")
    modules = [re.findall(r"torchrun (.*?)\x1b", out) for out in (first, other)]
    assert len(modules[0]) == 9
    assert [line.replace("--node_rank=0", "--node_rank=2") for line in modules[0]] == modules[1]
    ports = [int(re.search(r"--master_port=(\d+)", line)[1]) for line in modules[0]]
    assert ports == list(range(29500, 29509))  # one for each stage
    for command in (
        "report reset",
        "nanochat.dataset",
        "tok_train",
        "gen_synthetic_data",
        "prepare",
        "report generate",
    ):
        assert command in first
        assert command not in other
    assert "--nnodes" not in dry_run(script)


def test_the_others_wait_without_touching_anything():
    """Of the commands that are printed, a machine that is not the first one runs torchrun's alone."""
    out = dry_run("speedrun.sh", "--nnodes=2", "--node_rank=1", "--master_addr=head", "--mc")
    commands = [line for line in out.splitlines() if "\x1b[1m+ " in line]
    assert commands
    assert all("+ torchrun " in line for line in commands)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes=2"], "--nnodes needs --master_addr"),
        (["--nnodes=two", "--master_addr=x"], "--nnodes takes a number of machines, got 'two'"),
        (["--nnodes=2", "--node_rank=2", "--master_addr=x"], "from 0 to 1, got '2'"),
        (["--node_rank=1"], "from 0 to 0, got '1'"),
        (["--nnodes=2", "--master_addr=x", "--master_port=p"], "--master_port takes a port"),
    ],
)
def test_wrong_options(options, message):
    command = ["bash", "speedrun.sh", "--dry-run", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert message in result.stderr


# ---------------------------------------------------------------------------------------------------------
# Cluster files

STANDINS = {
    "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"',
    # Runs the command once for each node, as srun does, or once when told --nodes=1
    "srun": """n=$SLURM_JOB_NUM_NODES
while [[ "${1:-}" = --* ]]; do [ "$1" = --nodes=1 ] && n=1; shift; done
for i in $(seq 0 $((n - 1))); do SLURM_NODEID=$i "$@" || exit 1; done""",
}


def slurm(tmp_path, *args, **changes):
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "1234567",
        "SLURM_GPUS_ON_NODE": "4",
        **changes,
    }
    command = ["bash", str(ROOT / "dev" / "cluster" / "slurm.sbatch"), *args]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", ["speedrun.sh", "run1000.sh"])
def test_slurm(script, tmp_path):
    result = slurm(tmp_path, script, "--dry-run", "--device_batch_size", "8")
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        launch = f"torchrun --nnodes=2 --node_rank={rank} --nproc_per_node=4 --master_addr=node7 --master_port=24567"
        assert f"{launch} --rdzv_conf=timeout=864000 -m scripts.base_train -- " in result.stdout
    assert result.stdout.count("tok_train") == 1
    assert "--device_batch_size 8" in result.stdout


def test_slurm_says_what_is_missing(tmp_path):
    assert "usage: sbatch" in slurm(tmp_path).stderr
    assert "a folder that all machines see" in slurm(tmp_path, "speedrun.sh", NANOCHAT_BASE_DIR="").stderr


@pytest.mark.parametrize("name", ["speedrun", "run1000"])
def test_skypilot(name, tmp_path):
    task = yaml.safe_load((ROOT / "dev" / "cluster" / f"{name}.sky.yaml").read_text())
    assert task["name"] == name
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["envs"]["NANOCHAT_BASE_DIR"] in task["volumes"]
    for part in ("setup", "run"):
        check = subprocess.run(["bash", "-n"], input=task[part], capture_output=True, text=True)
        assert check.returncode == 0, check.stderr
    nodes = task["num_nodes"]
    for rank in range(nodes):
        env = {
            **os.environ,
            **task["envs"],
            "NANOCHAT_BASE_DIR": str(tmp_path),
            "SKYPILOT_NUM_NODES": str(nodes),
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "\n".join(f"10.0.0.{i}" for i in range(nodes)),
            "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        }
        script = task["run"].replace(f"{name}.sh", f"{name}.sh --dry-run")
        result = subprocess.run(["bash", "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        launch = f"torchrun --nnodes={nodes} --node_rank={rank} --nproc_per_node=8 --master_addr=10.0.0.0"
        assert f"{launch} --master_port=29500" in result.stdout
    # What the options ask for must add up: whole micro-batches of all GPUs in a step's tokens
    batch = int(re.search(r"--device_batch_size=(\d+)", task["run"])[1])
    assert 524288 % (batch * 2048 * 8 * nodes) == 0


@pytest.mark.parametrize("path", ["dev/cluster/slurm.sbatch", "dev/recipe.sh", "speedrun.sh", "run1000.sh"])
def test_scripts_are_bash(path):
    assert subprocess.run(["bash", "-n", path], cwd=ROOT).returncode == 0
