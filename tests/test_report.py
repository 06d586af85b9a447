"""The report card: sections, header, plots, final table, and that both copies of it are whole."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanochat import report_header
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.plots import plot_log, read_log, series, smoothed
from nanochat.report import (
    Config,
    Report,
    compression_yardstick,
    format_duration,
    format_value,
    get_report,
    main,
    slugify,
)

IMAGE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The base folder, with the working directory in another place."""
    base, here = tmp_path / "base", tmp_path / "here"
    here.mkdir()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.chdir(here)
    return base


def write_log(base, name, records):
    path = base / "logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def training_records(steps=40):
    for step in range(steps):
        yield {"step": step, "train/loss": 8 * math.exp(-step / 9) + 2, "train/tok_per_sec": 5e3 + step}
        if step % 10 == 0:
            yield {"step": step, "val/bpb": 3 * math.exp(-step / 9) + 1, "train/mfu": None}


# ---------------------------------------------------------------------------------------------------------
# Sections


def test_log_writes_markdown_and_figures(base):
    path = get_report().log(
        section="Base model training",
        data=[{"depth": 4, "lr": 0.02}, None, "### Samples\n\nHello.", {"tokens": 524288, "tag": None}],
    )
    assert path == base / "report" / "base-model-training.md"
    text = path.read_text()
    assert text.startswith("## Base model training\n\ntimestamp: 20")
    assert "\n\n- depth: 4\n- lr: 0.0200\n\n### Samples\n\nHello.\n\n- tokens: 524,288\n- tag: -\n" in text
    record = get_report().figures("base-model-training")
    assert record["section"] == "Base model training"
    assert record["data"] == {"depth": 4, "lr": 0.02, "tokens": 524288, "tag": None}


def test_log_takes_the_place_of_the_older(base):
    get_report().log("Chat SFT", [{"loss": 1}])
    get_report().log("Chat SFT", [{"bpb": 2}])
    assert get_report().figures("chat-sft")["data"] == {"bpb": 2}
    assert "loss" not in (base / "report" / "chat-sft.md").read_text()


def test_figures_of_many_kinds_are_kept(base):
    data = {
        "tensor": torch.tensor(1.5),
        "numpy": np.float32(0.25),
        "count": np.int64(7),
        "path": Path("a"),
        "flag": True,
        "nothing": float("nan"),
    }
    text = get_report().log("Kinds", [data]).read_text()
    for line in ("tensor: 1.5000", "numpy: 0.2500", "count: 7", "path: a", "flag: True", "nothing: nan"):
        assert f"- {line}\n" in text
    kept = get_report().figures("kinds")["data"]
    assert (kept["tensor"], kept["numpy"], kept["count"], kept["flag"]) == (1.5, 0.25, 7, True)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1234567, "1,234,567"),
        (-3, "-3"),
        (True, "True"),
        (0.22194, "0.2219"),
        (0.0, "0"),
        (0.004, "0.004"),
        (12345.678, "12,345.6780"),
        (3.9169e19, "3.917e+19"),
        (1e-10, "1e-10"),
        (float("inf"), "inf"),
        (None, "-"),
        ("two\nlines", "two\\nlines"),
    ],
)
def test_format_value(value, expected):
    assert format_value(value) == expected


@given(st.floats(-1e300, 1e300))
def test_format_value_keeps_the_size(value):
    assert float(format_value(value).replace(",", "")) == pytest.approx(value, rel=0.0051, abs=1e-300)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0m00s"),
        (59.6, "1m00s"),
        (725, "12m05s"),
        (3599.7, "1h00m"),
        (3 * 3600 + 51 * 60 + 20, "3h51m"),
        (41.6 * 3600, "41h36m"),
    ],
)
def test_format_duration(seconds, expected):
    assert format_duration(seconds) == expected


def test_slugify():
    assert slugify("Base model evaluation") == "base-model-evaluation"
    assert slugify("CORE evaluation of openai-community/gpt2 ../x") == "core-evaluation-of-openai-community-gpt2-x"


def test_failing_write_leaves_the_old_section(base):
    class Unprintable:
        def __str__(self):
            raise RuntimeError("no words")

    report = get_report()
    path = report.log("Chat SFT", [{"loss": 1}])
    before = path.read_text()
    with pytest.raises(RuntimeError, match="no words"):
        report._write("chat-sft", "Chat SFT", "new", {"loss": 2, "bad": Unprintable()})
    assert path.read_text() == before
    assert report.figures("chat-sft")["data"] == {"loss": 1}
    assert sorted(p.name for p in path.parent.iterdir()) == ["chat-sft.json", "chat-sft.md"]


def test_a_full_disk_fails_no_stage(base, capsys, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert get_report().log("Chat SFT", [{"loss": 1}], {"Loss": b"png"}) is None
    assert "the report has no section 'Chat SFT': " in capsys.readouterr().out


def test_stray_files(base, tmp_path, capsys):
    """Notes in any encoding, JSON of others, folders, sections of nanochat, which has no JSON."""
    main(Config("reset"))
    folder = base / "report"
    (folder / "mine.md").write_bytes("Straße".encode("latin-1"))
    (folder / "mine.json").write_text("[1, 2")
    (folder / "other.md").write_text("## Other\n")
    (folder / "other.json").write_text('["not a section"]')
    (folder / "midtraining.md").write_text("## Midtraining\n\n- loss: 2.5\n")
    (folder / "folder.md").mkdir()
    path = get_report().generate(tmp_path)
    text = path.read_text()
    assert "Stra" in text
    assert "- loss: 2.5" in text
    assert "Total wall clock time: 0m0" in text
    main(Config("reset"))
    assert not (folder / "mine.md").exists()
    assert (folder / "folder.md").exists()


def test_other_processes_write_nothing(base, monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert get_report().log(section="Chat SFT", data=[{"loss": 1}]) is None
    assert not (base / "report").exists()


# ---------------------------------------------------------------------------------------------------------
# Header


def test_reset_forgets_the_last_run(base):
    write_log(base, "base_d4.jsonl", training_records())
    get_report().log("Chat SFT", [{"loss": 1}])
    get_report().generate()
    (base / "report" / "notes.txt").write_text("mine")
    main(Config("reset"))
    left = sorted(str(p.relative_to(base / "report")) for p in (base / "report").rglob("*") if p.is_file())
    assert left == ["header.json", "header.md", "notes.txt"]
    text = (base / "report" / "header.md").read_text()
    for part in (
        "# Report card",
        "Started: 20",
        "Platform:",
        "CPU:",
        "Memory:",
        "GPUs:",
        "Python:",
        "PyTorch:",
    ):
        assert part in text
    assert get_report().figures("header")["data"]["Size of the project"]["Files"] >= 0


def test_header_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert report_header.git_info() == {"Git": "no commit"}
    assert report_header.size_info()["Files"] == 0


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_size_of_a_project(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "a.py").write_text("print(1)\nprint(2)\n")
    (tmp_path / "ü.md").write_text("éé\n", encoding="utf-8")
    (tmp_path / "gone.py").write_text("x")
    (tmp_path / "data.bin").write_bytes(b"\xff" * 100)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    (tmp_path / "gone.py").unlink()
    (tmp_path / "untracked.py").write_text("y")
    facts = {"Characters": 21, "Lines": 3, "Files": 2, "Tokens (approx)": 5}
    assert report_header.size_info(tmp_path) == facts
    (tmp_path / "uv.lock").write_text(
        '[[package]]\nname = "me"\nsource = { virtual = "." }\n[[package]]\nname = "torch"\n'
    )
    assert report_header.size_info(tmp_path) == {**facts, "Dependencies (uv.lock packages)": 1}


def test_price():
    assert report_header.price_per_hour(["NVIDIA H100 80GB HBM3"] * 8) == 24.0
    assert report_header.price_per_hour([]) is None
    for other in ("Some other GPU", "NVIDIA L40"):  # which is no L4
        assert report_header.price_per_hour(["NVIDIA H100 80GB HBM3", other]) is None


# ---------------------------------------------------------------------------------------------------------
# The whole report


def test_order_of_sections(base):
    for section in (
        "Zebra",
        "Chat RL",
        "Alpha",
        "Base model evaluation",
        "Tokenizer training",
        "Midtraining",
    ):
        get_report().log(section, ["text"])
    text = get_report().generate().read_text()  # without a header, too
    assert re.findall("^##? (.*)", text, re.MULTILINE) == [
        "Report card",
        "Tokenizer training",
        "Base model evaluation",
        "Midtraining",
        "Chat RL",
        "Alpha",
        "Zebra",
        "Summary",
    ]
    assert "wall clock time: unknown" in text


def test_final_table_and_wall_clock(base):
    report = get_report()
    report.reset()
    report.log("Base model evaluation", [{"Model": "d20", "CORE metric": 0.22188}, {"arc_easy": 0.5}])
    report.log("Chat evaluation mid", [{"ARC-Challenge": 0.2875, "ARC-Easy": 0.3561, "ChatCORE": 0.073}])
    report.log("Chat evaluation sft", [{"ARC-Challenge": 0.2807, "GSM8K": 0.0455}, {"ChatCORE": 0.0884}])
    report.log("Chat evaluation rl", [{"GSM8K": 0.0758}])
    times = {
        "header": 1000.0,
        "base-model-evaluation": 5000.0,
        "chat-evaluation-rl": 1000.0 + 3 * 3600 + 51 * 60,
    }
    for path in (base / "report").glob("*.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "time": times.get(path.stem, 2000.0)}))
    text = report.generate().read_text()
    assert "- Characters: " in text.split("## Summary")[1]
    assert text.endswith("""
| Metric          | BASE     | MID      | SFT      | RL       |
|-----------------|----------|----------|----------|----------|
| CORE            | 0.2219   | -        | -        | -        |
| ARC-Challenge   | -        | 0.2875   | 0.2807   | -        |
| ARC-Easy        | -        | 0.3561   | -        | -        |
| GSM8K           | -        | -        | 0.0455   | 0.0758   |
| HumanEval       | -        | -        | -        | -        |
| MMLU            | -        | -        | -        | -        |
| ChatCORE        | -        | 0.0730   | 0.0884   | -        |

Total wall clock time: 3h51m
""")


def test_plots_lie_where_both_copies_look_for_them(base):
    write_log(base, "base_d4.jsonl", training_records())
    write_log(base, "sft_d4.jsonl", training_records())
    write_log(base, "mc_tree.jsonl", training_records())
    write_log(base, "rl_empty.jsonl", [])
    write_log(base, "rl_bare.jsonl", [{"step": 1, "train/lr": 0.1}, {"step": 2, "train/loss": None}])
    get_report().log("Base model training", [{"depth": 4}])
    get_report().log("Base model loss", [{"gzip -9 (bpb)": 2.1, "xz -9 (bpb)": 1.9}])
    original = get_report().generate()
    copy = Path.cwd() / "report.md"
    assert original.read_text() == copy.read_text()
    links = IMAGE.findall(copy.read_text())
    assert links == ["report/base_d4.png", "report/mc_tree.png", "report/sft_d4.png"]
    for folder in (original.parent, copy.parent):
        for link in links:
            with Image.open(folder / link) as image:
                pixels = np.asarray(image.convert("L"))
            assert pixels.shape[1] > 1000
            assert pixels.std() > 5  # something is drawn
    # The base model's plot is in its section, those of stages without a section come after all sections
    text = copy.read_text()
    assert text.index("base_d4.png") < text.index("## Base model loss") < text.index("mc_tree.png")
    assert text.index("## Other training logs") < text.index("sft_d4.png") < text.index("## Summary")


def test_working_directory_may_be_the_base_folder(base, monkeypatch):
    write_log(base, "base_d4.jsonl", training_records())
    get_report().log("Base model training", [{"depth": 4}])
    for folder in (base, base / "report"):
        monkeypatch.chdir(folder)
        get_report().generate()
        (link,) = IMAGE.findall((folder / "report.md").read_text())
        assert (folder / link).is_file()
        assert get_report().slugs() == ["base-model-training"]


def test_nothing_to_report(base):
    get_report().reset()
    with pytest.raises(UserError, match=r"no sections in .*report: run a stage"):
        get_report().generate()


def test_damaged_figures(base):
    get_report().log("Base model evaluation", [{"CORE metric": 0.2}])
    (base / "report" / "base-model-evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"base-model-evaluation\.json is not valid JSON"):
        get_report().generate()


def test_command_line(base):
    assert parse(Config, []) == Config("generate")
    assert parse(Config, ["reset"]) == Config("reset")
    command = [sys.executable, "-m", "nanochat.report", "generate"]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 1
    assert "error: there are no sections" in result.stderr
    assert "Traceback" not in result.stderr


# ---------------------------------------------------------------------------------------------------------
# Training logs and plots


def test_later_line_of_a_step_counts(base):
    lines = [
        {"step": 0, "train/loss": 9.0},
        {"step": 1, "train/loss": 8.0, "val/bpb": 3.0},
        {"step": 2, "train/loss": 7.0},
        {"step": 1, "train/loss": 8.5},  # resumed from step 1
        {"step": 2, "train/loss": 7.5, "core_metric": 0.1},
    ]
    records = read_log(write_log(base, "base_d4.jsonl", lines))
    assert [record["step"] for record in records] == [0, 1, 2]
    steps, values = series(records, "train/loss")
    assert (list(steps), list(values)) == ([0, 1, 2], [9.0, 8.5, 7.5])
    assert [list(array) for array in series(records, "val/bpb")] == [[1], [3.0]]


@pytest.mark.parametrize("tail", ['{"step": 2, "train/lo', '{"step": 2, "x": 1}\n{"st', "\x00\x00\x00", "\n\n"])
def test_last_line_may_be_cut_short(base, tail):
    path = write_log(base, "base_d4.jsonl", [{"step": 0, "train/loss": 9}, {"step": 1, "train/loss": 8}])
    path.write_text(path.read_text() + tail)
    assert list(series(read_log(path), "train/loss")[1]) == [9, 8]


@pytest.mark.parametrize("bad", ['{"step": 2, "tr', "7", '{"loss": 1}', '{"step": null}'])
def test_other_damaged_lines_are_named(base, bad):
    path = write_log(base, "base_d4.jsonl", [{"step": 0}])
    path.write_text(path.read_text() + bad + "\n" + '{"step": 3}\n')
    with pytest.raises(UserError, match=r"base_d4\.jsonl, line 2: expected a JSON object with a step"):
        read_log(path)


def test_series_skips_what_is_no_number():
    records = [{"step": i, "a": a} for i, a in enumerate([1, None, float("nan"), float("inf"), "x", 2.5])]
    assert [list(array) for array in series(records, "a")] == [[0, 5], [1.0, 2.5]]
    assert [list(array) for array in series(records, "b")] == [[], []]


def test_smoothed_equals_its_definition():
    values, span = np.array([5.0, 3.0, 4.0, 1.0, 2.0]), 4
    for t in range(len(values)):
        weights = np.array([(1 - 1 / span) ** (t - i) for i in range(t + 1)])
        assert smoothed(values, span)[t] == pytest.approx((weights * values[: t + 1]).sum() / weights.sum())
    assert list(smoothed(values, 0.1)) == list(values)


def test_plot_of_little():
    assert plot_log([], "empty") is None
    assert plot_log([{"step": 5}], "nothing to draw") is None
    for key in ("train/loss", "val/bpb", "train/tok_per_sec"):
        png = plot_log([{"step": 5, key: 2.0}], "one point", {"gzip -9": 2.0})
        assert png.startswith(b"\x89PNG")


def test_the_loss_with_gists_is_a_sum_and_not_drawn():
    whole, summed = ([{"step": 5, "train/loss": loss, "mc/base_loss": 2.0}] for loss in (2.0, 7.0))
    assert plot_log(whole, "t") == plot_log(summed, "t") != plot_log([{"step": 5, "train/loss": 7.0}], "t")


def test_yardsticks_are_drawn():
    records = list(training_records())
    assert plot_log(records, "t", {"gzip -9": 2.0}) != plot_log(records, "t")


# ---------------------------------------------------------------------------------------------------------
# The compressors' yardstick


def test_compression_yardstick():
    noise = np.random.default_rng(0).bytes(50_000)
    assert all(8 <= bpb < 8.1 for bpb in compression_yardstick(noise).values())
    assert all(bpb < 0.1 for bpb in compression_yardstick(bytes(50_000)).values())
    with pytest.raises(ValueError, match="some text"):
        compression_yardstick(b"")


@pytest.mark.parametrize("tool", ["gzip", "xz"])
def test_compression_yardstick_equals_the_tools(tool):
    if not shutil.which(tool):
        pytest.skip(f"needs {tool}")
    text = Path(Report.__init__.__code__.co_filename).read_bytes() * 3
    size = len(subprocess.run([tool, "-9", "-c"], input=text, capture_output=True, check=True).stdout)
    assert compression_yardstick(text)[f"{tool} -9 (bpb)"] == pytest.approx(8 * size / len(text), rel=0.01)
