"""dev/gpu_check.sh: the check of a GPU, rehearsed on a CPU."""

import json
import os
import subprocess
import sys

from dev.gpu_check import STAGES, run_stage
from tests.helpers import ROOT


def test_the_rehearsal_goes_through_all_stages(tmp_path):
    """As on a machine with a GPU, in tiny sizes: every step of every stage ends well and leaves its figures."""
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = ["bash", "dev/gpu_check.sh", "--rehearse"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log") if "Traceback" in path.read_text())
    assert result.returncode == 0, result.stdout + result.stderr + logs
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [stage["stage"] for stage in report["stages"]] == [stage.__name__ for stage in STAGES]
    figures = [figure for stage in report["stages"] for figure in stage["figures"]]
    assert {figure["result"] for figure in figures if "step" in figure} == {"ok"}
    measured = " ".join(figure["benchmark"] for figure in figures if "benchmark" in figure)
    assert all(name in measured for name in ("train:", "train --mc:", "decode:", "mc-infer:", "server"))
    assert any("mc_eval" in figure for figure in figures)
    assert len(list(tmp_path.iterdir())) == 1 + len(STAGES)  # so few files come back


def test_a_stage_that_hangs_or_fails_leaves_what_it_had(tmp_path):
    """And takes along what it started."""
    program = """if True:
        import subprocess, sys, time
        print('{"step": "first", "result": "ok"}', flush=True)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print('{"child": %d}' % child.pid, flush=True)
        time.sleep(60)
    """
    stage = run_stage("slow", 3, [sys.executable, "-c", program], tmp_path / "slow.log")
    assert stage["result"] == "ended after 3 s"
    first, child = stage["figures"]
    assert first == {"step": "first", "result": "ok"}
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(child["child"])], capture_output=True, text=True).stdout
    assert not state or state.startswith("Z")
    stage = run_stage("bad", 5, [sys.executable, "-c", "print('{\"a\": 1}'); 1 / 0"], tmp_path / "bad.log")
    assert (stage["result"], stage["figures"]) == ("failed", [{"a": 1}])


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, "-m", "dev.gpu_check", f"--out={tmp_path}"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "--rehearse" in result.stderr
    assert "Traceback" not in result.stderr
