"""What the environment may do to a program: each fault is a sentence that helps, none a traceback."""

import os
import subprocess
import sys

import pytest
import torch

from nanochat import configurator
from nanochat.common import Stopwatch, UserError, atomic_write, compute_init, get_base_dir, get_dist_info, resolve_dtype
from nanochat.options import ModelOptions
from tests.helpers import ROOT


def test_dtypes_and_nanochats_names_for_them():
    assert resolve_dtype("bf16", "cpu") == resolve_dtype("bfloat16", "cpu") == torch.bfloat16
    assert resolve_dtype("fp32", "cpu") == resolve_dtype("float32", "cpu") == torch.float32
    with pytest.raises(UserError, match="--dtype must be auto, bf16 or fp32, got 'half'"):
        resolve_dtype("half", "cpu")


def test_a_stopwatch_times_the_work_of_a_gpu_and_not_its_launch(monkeypatch):
    told = []

    class Event:
        def __init__(self, enable_timing):
            self.number = len(told)

        def record(self):
            told.append("record")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, other):
            return 12.5 * (other.number - self.number)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watch = Stopwatch(torch.device("cuda"))
    watch.stop()
    assert told == ["record", "record"]  # nobody has waited yet
    assert float(watch) == 12.5
    assert told == ["record", "record", "wait"]


def test_names_of_the_step():
    for argv in (["--step=7"], ["-s", "7"], ["--model_step=7"], ["--model-step", "7"]):
        assert configurator.parse(ModelOptions, argv).step == 7


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "1"}, {"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "x"}],
)
def test_half_of_torchruns_variables(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="expected RANK, LOCAL_RANK and WORLD_SIZE all set"):
        get_dist_info()


def test_torchruns_variables_without_an_address(monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="RANK is set but MASTER_ADDR and MASTER_PORT not: launch with torchrun"):
        compute_init("cpu")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    values = {"RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="process 2 of this machine needs a GPU of its own, and there are 2"):
        compute_init("cuda")


def script(code, *options, **env):
    """What `run` makes of a script with these lines for its main."""
    program = (
        "from dataclasses import dataclass\nfrom nanochat.common import *\nfrom nanochat.configurator import run\n"
    )
    program += "@dataclass\nclass Config:\n    x: int = 1\n" + f"def main(config):\n    {code}\nrun(main, Config)"
    command = [sys.executable, *options, "-c", program]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.run(command, env=env, capture_output=True, timeout=60)


def test_no_home_and_no_passwd_entry():
    code = "import pwd; pwd.getpwuid = {}.__getitem__; del os.environ['HOME']; get_base_dir()"
    result = script(code, NANOCHAT_BASE_DIR="")
    assert result.returncode == 1
    assert b"cannot create ~/.cache/nanochat" in result.stderr
    assert b"set NANOCHAT_BASE_DIR" in result.stderr
    assert b"Traceback" not in result.stderr


def test_a_full_disk_and_a_read_only_folder():
    result = script("open('/dev/full', 'w').write('x' * 100_000)")
    assert result.returncode == 1
    assert b"error: writing: No space left on device; free some space, then run it again" in result.stderr
    result = script("raise OSError(30, 'Read-only file system', '/somewhere')")
    assert b"error: /somewhere: Read-only file system; choose a folder" in result.stderr
    assert b"Traceback" in script("raise OSError(5, 'Input/output error')").stderr  # unknown: to be looked into


def test_a_failed_write_says_which_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error, atomic_write(tmp_path / "file", "w") as file:
        file.write("text")
    assert error.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_an_ascii_terminal():
    result = script("print('a → b'); raise UserError('B × T')", PYTHONIOENCODING="ascii")
    assert result.stdout == b"a ? b\n"
    assert b"error: B ? T" in result.stderr
    assert script("pass", "-X", "utf8=0", PYTHONIOENCODING="ascii").returncode == 0


def test_a_base_folder_that_cannot_be_made(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "base"))
    with pytest.raises(UserError, match=r"cannot create .*Not a directory.*set NANOCHAT_BASE_DIR to a writable folder"):
        get_base_dir()
