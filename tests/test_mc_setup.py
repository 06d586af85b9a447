"""./mc_setup in a bare copy of its files: what it asks, and what it writes to .mc_env. It installs nothing here."""

import contextlib
import os
import pty
import shutil
import stat
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers import ROOT

NAMES = ["NANOCHAT_BASE_DIR", "WANDB_API_KEY", "WANDB_RUN", "HF_TOKEN", "MC_OTEL_ENDPOINT", "MC_OTEL_INSECURE"]
QUESTIONS = 5


@pytest.fixture
def clone(tmp_path):
    """A folder with ./mc_setup and what it reads."""
    folder = tmp_path / "my clone"
    (folder / "dev").mkdir(parents=True)
    shutil.copy(ROOT / "mc_setup", folder)
    shutil.copy(ROOT / "dev" / "recipe.sh", folder / "dev")
    return folder


def environment(**values):
    return {**{k: v for k, v in os.environ.items() if k not in NAMES}, **values}


def setup(clone, *options, **values):
    command = ["./mc_setup", "--no-install", *options]
    return subprocess.run(
        command,
        cwd=clone,
        env=environment(**values),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def read_back(clone, *names):
    """What a recipe gets from .mc_env."""
    script = 'set -euo pipefail; set -a; . ./.mc_env; set +a; for n in "$@"; do printf \'%s\\0\' "${!n-}"; done'
    command = ["bash", "-c", script, "bash", *names]
    return (
        subprocess.run(command, cwd=clone, env=environment(), capture_output=True, check=True)
        .stdout.decode()
        .split("\0")[:-1]
    )


def answer(clone, *lines):
    """./mc_setup on a terminal with these answers; returns (exit code, what it showed)."""
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        ["./mc_setup", "--no-install"],
        **{"cwd": clone, "env": environment(TERM="dumb"), "start_new_session": True},
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
    )
    os.close(theirs)
    os.write(terminal, "".join(f"{line}\n" for line in lines).encode())
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other side has gone
        while more := os.read(terminal, 4096):
            shown += more
    os.close(terminal)
    return process.wait(30), shown.decode()


def test_yes_on_a_bare_machine(clone):
    result = setup(clone, "--yes")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "bash run10.sh" in result.stdout
    assert all(part in result.stdout for part in ("Python", "compiler", "Rust", "GPUs", "disk"))
    folder, *others = read_back(clone, *NAMES)
    assert folder.endswith("/.cache/nanochat-cpu")  # of the profile that runs here
    assert others == [""] * len(others)
    assert stat.S_IMODE((clone / ".mc_env").stat().st_mode) == 0o600
    assert [path.name for path in clone.iterdir() if "mc_env" in path.name] == [".mc_env"]


def test_again_changes_nothing(clone):
    assert setup(clone, "--yes", HF_TOKEN="hf_1").returncode == 0
    before = (clone / ".mc_env").read_bytes(), (clone / ".mc_env").stat().st_mtime_ns
    result = setup(clone, "--yes")
    assert ".mc_env is as it was" in result.stdout
    assert ((clone / ".mc_env").read_bytes(), (clone / ".mc_env").stat().st_mtime_ns) == before
    assert read_back(clone, "HF_TOKEN") == ["hf_1"]


@given(st.text(st.characters(exclude_categories=["C"]), min_size=1))
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_come_back_as_they_were(clone, value):
    (clone / ".mc_env").unlink(missing_ok=True)
    result = setup(clone, "--yes", HF_TOKEN=value)
    assert result.returncode == 0, result.stderr
    assert read_back(clone, "HF_TOKEN") == [value]


def test_what_a_shell_would_trip_over(clone):
    values = {"HF_TOKEN": "a b  c", "WANDB_API_KEY": "'\"$HOME `id` $(id) \\ !x #y;&|", "WANDB_RUN": "-n * ~ é🙂"}
    assert setup(clone, "--yes", **values).returncode == 0
    assert read_back(clone, *values) == list(values.values())
    assert setup(clone, "--yes").returncode == 0
    assert read_back(clone, *values) == list(values.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"HF_TOKEN": "a\nb"}, "HF_TOKEN must be a single line"),
        ({"WANDB_RUN": "a\x1b[0m"}, "WANDB_RUN must be a single line"),
        ({"MC_OTEL_ENDPOINT": "localhost:4318"}, "MC_OTEL_ENDPOINT must be like http://localhost:4318"),
        ({"MC_OTEL_ENDPOINT": "grpc://a", "MC_OTEL_INSECURE": "maybe"}, "MC_OTEL_INSECURE must be 0 or 1, got 'maybe'"),
    ],
)
def test_values_that_cannot_be(clone, values, message):
    result = setup(clone, "--yes", **values)
    assert result.returncode == 1
    assert message in result.stderr
    assert not (clone / ".mc_env").exists()


def test_what_is_there_is_kept(clone):
    """Lines of others, comments, values by other means; and the environment does not win over the file."""
    text = '# mine\nexport HF_TOKEN="hf_mine"\nOMP_NUM_THREADS=3\nNANOCHAT_BASE_DIR="$HOME/x"  # by hand'
    (clone / ".mc_env").write_text(text)
    (clone / ".mc_env").chmod(0o644)
    assert setup(clone, "--yes", HF_TOKEN="other", WANDB_RUN="r1").returncode == 0
    assert (clone / ".mc_env").read_text() == f"{text}\nWANDB_RUN='r1'\n"
    assert stat.S_IMODE((clone / ".mc_env").stat().st_mode) == 0o600


def test_a_file_that_is_no_script(clone):
    (clone / ".mc_env").write_text("HF_TOKEN='half\n")
    result = setup(clone, "--yes")
    assert result.returncode == 1
    assert ".mc_env is no shell script" in result.stderr
    assert (clone / ".mc_env").read_text() == "HF_TOKEN='half\n"


def test_questions(clone):
    code, shown = answer(clone, "/data/my runs", "secret-key", "run 1", "", "nonsense", "http://localhost:4318")
    assert code == 0, shown
    assert "must be like" in shown
    assert "python -m dev.telemetry.dashboards" in shown
    assert "run10.sh --mc" in shown
    expected = ["/data/my runs", "secret-key", "run 1", "", "http://localhost:4318", ""]
    assert read_back(clone, *NAMES) == expected
    after_first = shown[shown.index("Token of Weights") :]
    assert "secret-key" not in after_first  # it was typed ahead once, before the question; a secret is not echoed
    code, shown = answer(clone, "", "", "-", "hf", "grpc://host", "1")
    assert code == 0, shown
    assert "[/data/my runs]" in shown
    assert read_back(clone, *NAMES) == ["/data/my runs", "secret-key", "", "hf", "grpc://host", "1"]
    assert "WANDB_RUN" not in (clone / ".mc_env").read_text()
    code, shown = answer(clone, *[""] * (QUESTIONS + 1))
    assert "is as it was" in shown


def test_an_end_of_answers_writes_nothing(clone):
    code, shown = answer(clone, "/data", "\x04")
    assert code == 1, shown
    assert not (clone / ".mc_env").exists()


def test_without_a_terminal(clone):
    result = setup(clone)
    assert result.returncode == 1
    assert "there is no terminal to ask questions on: run ./mc_setup --yes" in result.stderr
    result = setup(clone, "--what")
    assert result.returncode == 1
    assert "unknown option '--what'" in result.stderr


def test_help_names_every_setting(clone):
    result = setup(clone, "--help")
    assert result.returncode == 0
    assert all(name in result.stdout for name in [*NAMES, "--yes", "--no-install"])


def test_an_old_python(clone, tmp_path):
    """Neither a Python that is new enough nor uv: said before anything is touched."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "nproc", "cat", "sed"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "python3").write_text("#!/bin/sh\necho Python 3.9.2; exit 1\n")
    (tools / "python3").chmod(0o755)
    result = setup(clone, "--yes", PATH=str(tools))
    assert result.returncode == 1
    assert "Python 3.11 or newer is missing (found: Python 3.9.2)" in result.stderr
    assert not (clone / ".mc_env").exists()


def test_git_does_not_see_it():
    assert subprocess.run(["git", "check-ignore", "-q", ".mc_env"], cwd=ROOT).returncode == 0
    assert os.access(ROOT / "mc_setup", os.X_OK)
