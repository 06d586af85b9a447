"""The dashboard of the training logs: what it reads, and what a browser makes of it."""

import json
import math
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import expect

from nanochat.common import UserError
from nanochat.live import PAGE, LiveServer, Logs, thinned


def record(step, **others):
    totals = {
        "total_training_tokens": 100 * step,
        "total_training_flops": 1e9 * step,
        "total_training_time": 0.5 * step,
    }
    return {"step": step, **totals, "train/loss": 5 - step / 100, "train/tok_per_sec": 3000.0, **others}


def mc_record(step):
    counts = {"mc/lod_count/0": 30.0, "mc/lod_count/1": 10.0 + step, "mc/lod_loss/0": 4.0, "mc/lod_loss/1": 4.5}
    return record(step, **counts, **{"mc/lens_loss": 0.6, "val/mc_context_gain": 0.5})


def write(folder, name, records, tail=""):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return path


# ---------------------------------------------------------------------------------------------------------
# Data


def test_neighbours_are_put_together():
    records = [{"step": i, "total_training_time": 10.0 * i, "a": float(i)} for i in range(6)]
    records[2]["a"], records[3]["a"] = None, math.nan
    records[5]["b"] = 7
    assert thinned(records, points=3) == {
        "step": [1, 3, 5],
        "total_training_time": [10, 30, 50],
        "a": [0.5, None, 4.5],
        "b": [None, None, 7],
    }
    assert thinned([]) == {}


@given(st.lists(st.floats(-1e6, 1e6) | st.none(), max_size=60), st.integers(1, 20))
@settings(max_examples=100, deadline=None)
def test_thinning_keeps_the_mean(values, points):
    columns = thinned([{"step": i, "a": v} for i, v in enumerate(values)], points)
    assert all(len(column) <= points for column in columns.values())
    there = [v for v in values if v is not None]
    assert ("a" in columns) == bool(there)
    for value in columns.get("a", []):
        assert value is None or min(there) - 1e-3 * abs(min(there)) <= value <= max(there) + 1e-3 * abs(max(there))
    if len(values) <= points and there:
        assert columns["a"] == [None if v is None else pytest.approx(v, rel=1e-6) for v in values]


def test_logs_are_read_again_only_when_they_change(tmp_path, monkeypatch):
    path = write(tmp_path, "base_d4", [record(1), record(2)], tail='{"step": 3, "tr')
    write(tmp_path, "sft_d4", [record(1)])
    logs, reads = Logs(tmp_path), []
    read = Logs._read
    monkeypatch.setattr(Logs, "_read", lambda self, path, changed: reads.append(path.stem) or read(path, changed))
    runs = {run["name"]: run for run in logs.runs()}
    assert runs["base_d4"]["columns"]["step"] == [1, 2]  # without the line that is being written
    assert runs["sft_d4"]["stage"] == "Supervised finetuning"
    with open(path, "a") as file:
        file.write('ain/loss": 4.5}\n')
    runs = {run["name"]: run for run in logs.runs()}
    assert runs["base_d4"]["columns"]["train/loss"] == [4.99, 4.98, 4.5]
    assert sorted(reads) == ["base_d4", "base_d4", "sft_d4"]


def test_a_damaged_log_does_not_hide_the_others(tmp_path):
    write(tmp_path, "base_d4", [record(1)])
    write(tmp_path, "mid_d4", [], tail='nonsense\n{"step": 2}\n')
    runs = {run["name"]: run for run in Logs(tmp_path).runs()}
    assert "line 1: expected a JSON object with a step" in runs["mid_d4"]["error"]
    assert runs["base_d4"]["columns"]["step"] == [1]
    assert Logs(tmp_path / "none").runs() == []


def test_a_port_that_is_taken(tmp_path):
    with (
        LiveServer("127.0.0.1", 0, Logs(tmp_path)) as server,
        pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{server.server_port}"),
    ):
        LiveServer("127.0.0.1", server.server_port, Logs(tmp_path))


def test_the_command(base_dir):
    write(base_dir / "logs", "base_d4", [mc_record(s) for s in range(5)])
    command = [sys.executable, "-m", "nanochat.report", "live", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split(" at ")[1].split(" ")[0]
        with urllib.request.urlopen(f"{url}data.json", timeout=30) as response:
            assert json.load(response)[0]["name"] == "base_d4"
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(f"{url}../../etc/passwd", timeout=30)
        refused.value.close()
        process.send_signal(2)
        assert process.wait(30) == 0


# ---------------------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture
def page(browser):
    page = browser.new_page()
    page.faults, page.asked = [], []
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("console", lambda message: page.faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: page.asked.append(request.url))
    yield page
    page.close()


@contextmanager
def served(logs):
    """The address of the page."""
    with LiveServer("127.0.0.1", 0, logs) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def titles(page):
    return page.locator("article h3").all_inner_texts()


def test_all_is_drawn(page, tmp_path, monkeypatch):
    """Everything that was logged is drawn; names are text, whatever is in them."""
    evil = "base_</script><img src=x onerror=alert(1)>"
    write(tmp_path, "base_d4", [record(s, **{"train/mfu": 0.3, "val/bpb": 2.0, "own": s}) for s in range(1, 900)])
    write(tmp_path, "base_mc", [mc_record(s) for s in range(1, 30)])
    logs = Logs(tmp_path)
    runs = logs.runs()
    monkeypatch.setattr(logs, "runs", lambda: [{**runs[0], "name": evil}, *runs[1:]])
    with served(logs) as url:
        page.goto(url)
        expect(page.locator(".chip")).to_have_count(2)
        assert evil in page.locator(".chip").all_inner_texts()
        names = {"Training loss", "Validation", "LOD mix", "Loss by LOD", "LensNet", "Context gain", "MFU", "own"}
        assert names <= set(titles(page))
        assert set(page.asked) == {url, f"{url}data.json"}
        assert page.faults == []
        mix = page.locator("article", has=page.get_by_role("heading", name="LOD mix"))
        expect(mix.locator(".area")).to_have_count(2)
        expect(mix.locator(".legend")).to_contain_text(f"LOD 0 {100 * 30 / 69:.1f}%")
        assert "NaN" not in page.locator("#charts").inner_html()


def test_runs_are_switched_and_compared_by_tokens(page, tmp_path):
    write(tmp_path, "base_a", [record(s) for s in range(1, 50)])
    write(tmp_path, "base_b", [record(s) for s in range(1, 50)])
    with served(Logs(tmp_path)) as url:
        page.goto(url)
        expect(page.locator(".chip")).to_have_count(2)
        loss = page.locator("article", has=page.get_by_role("heading", name="Training loss"))
        expect(loss.locator(".curve")).to_have_count(2)
        page.get_by_role("button", name="base_b").click()
        expect(loss.locator(".curve")).to_have_count(1)
        expect(loss.locator(".legend")).to_contain_text("base_a 4.51")
        expect(loss.locator("svg")).not_to_contain_text("4000")
        page.get_by_label("compare by").select_option("tokens")
        expect(loss.locator("svg")).to_contain_text("4000")
        loss.locator("svg").hover()
        expect(loss.locator(".legend")).to_contain_text("at ")
        assert page.faults == []


def test_the_page_follows_a_run(page, tmp_path):
    """From no log at all, over a half-written line, to a new value, without a reload."""
    with served(Logs(tmp_path)) as url:
        page.goto(url)
        expect(page.locator("#empty")).to_be_visible()
        path = write(tmp_path, "base_d4", [record(1), record(2)], tail='{"step": 3')
        expect(page.locator(".tile", has_text="step").locator("b")).to_have_text("2", timeout=10_000)
        expect(page.locator("#state")).to_have_text("live, base_d4")
        write(tmp_path, path.stem, [record(1), record(2), record(3)])
        expect(page.locator(".tile", has_text="step").locator("b")).to_have_text("3", timeout=10_000)
        assert page.faults == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(page, tmp_path, scheme):
    """Contrast of at least 4.5 to 1 (WCAG AA) wherever there is text, and nothing wider than a telephone."""
    write(tmp_path, "base_mc", [mc_record(s) for s in range(1, 30)])
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 800})
    with served(Logs(tmp_path)) as url:
        page.goto(url)
        expect(page.locator(".chip")).to_have_count(1)
    colours = page.evaluate(
        """() => [...document.querySelectorAll("h1, h2, h3, article p, span, .tile b, svg text, .chip")]
        .filter(node => node.textContent.trim()).map(node => {
            let back = node;
            while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
            const style = getComputedStyle(node);
            return [node instanceof SVGElement ? style.fill : style.color, getComputedStyle(back).backgroundColor];
        })"""
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert len(colours) > 30
    for pair in set(map(tuple, colours)):
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5, pair
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_page_loads_nothing_from_elsewhere():
    text = PAGE.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
    assert "http" not in text
    assert "innerHTML" not in text
