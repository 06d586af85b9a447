"""scripts.mc_stream as users call it: create, append, resume, show, export, compact; chats about a stream."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import numpy as np
import pytest
import torch

from megacontext import streams
from megacontext.arrays import FILE, Arrays
from megacontext.config import MCConfig
from megacontext.networks import MCNetworks
from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.find import find_text
from nanochat.tokenizer import get_tokenizer
from scripts import chat_web
from tests.helpers import ROOT, call_script, until
from tests.helpers_server import ask, said, serving

SETTINGS = MCConfig(block_size=4, allocator_soft_max=40, allocator_recent_tokens=8, mc_infer_refocus_interval=6)
CPU = ["--device_type=cpu"]
HAY = [path for path in sorted((ROOT / "nanochat").glob("*.py")) if "_" != path.name[0] < "cg"]


@pytest.fixture(scope="module")
def trained(base):
    """The base model as an SFT model, with networks beside it, and the same with others at a later step."""
    model, _, meta, _ = cm.load_checkpoint(base / "base_checkpoints" / "d1", 7, "cpu")
    config = SETTINGS.resolve(64)
    facts = {"model_config": meta["model_config"], "megacontext": dataclasses.asdict(config)}
    for step in (3, 4):
        torch.manual_seed(step)
        networks = MCNetworks(64, 1, config)
        with torch.no_grad():
            for p in networks.parameters():
                p.add_(0.1 * torch.randn_like(p))
        folder = base / "chatsft_checkpoints" / "mc"
        cm.save_checkpoint(folder, step, model, None, facts, companion_data=networks.state_dict())
    return base


@pytest.fixture
def text(trained, tmp_path, monkeypatch):
    """A folder of text; no standard input."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    (tmp_path / "text" / "more").mkdir(parents=True)
    for path in HAY:
        (tmp_path / "text" / path.name).write_text(path.read_text())
    (tmp_path / "text" / "more" / "z.md").write_text("Lönneberga's white whale 🐋 was 鯨 here.\n")
    (tmp_path / "text" / "picture.png").write_bytes(b"\x89PNG\0")
    yield tmp_path / "text"
    for folder in streams.streams_dir().iterdir():
        streams.delete_stream(folder)


def stream(command, name="", *arguments, step=3):
    call_script("mc_stream", [command, name, *map(str, arguments), *CPU, f"--step={step}"])


def documents_of(folder):
    return [path.read_text() for path in sorted(folder.rglob("*.*")) if path.suffix != ".png"]


def exported(name, capsys):
    capsys.readouterr()
    stream("export", name)
    return [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]


def test_a_folder_is_read_shown_and_given_back(text, capsys):
    stream("create", "hay", text)
    out = capsys.readouterr().out
    assert "left out, binary: 1" in out
    assert exported("hay", capsys) == documents_of(text)
    stream("list")
    assert "hay  " in capsys.readouterr().out
    stream("show", "hay", "--find=white whale 🐋")
    out = capsys.readouterr().out
    assert "Lönneberga's white whale 🐋 was" in out
    at = int(out.splitlines()[-1].split()[0].replace(",", ""))
    stream("show", "hay", f"--at={at}", "--length=60")
    assert "white whale 🐋 was 鯨 here." in capsys.readouterr().out
    with pytest.raises(UserError, match="there already"):
        stream("create", "hay", text)
    stream("append", "hay", text)  # what has been read to its end is not read again
    assert " 0 of them new" in capsys.readouterr().out
    (text / "more" / "z.md").write_text("changed")
    stream("append", "hay", text / "more")
    assert exported("hay", capsys)[-1] == "changed"
    stream("delete", "hay")
    with pytest.raises(UserError, match="there is no stream 'hay'"):
        stream("show", "hay")
    with pytest.raises(UserError, match="a stream's name"):
        stream("show", "../hay")
    with pytest.raises(UserError, match="is not there"):
        stream("create", "hay", text / "nowhere")


def test_standard_input_and_what_export_wrote(text, tmp_path, capsys):
    lines = "".join(f"line {i}\n" for i in range(2500))
    command = [sys.executable, "-m", "scripts.mc_stream", "create", "log", *CPU]
    result = subprocess.run(command, input=lines.encode(), capture_output=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr.decode()
    found = exported("log", capsys)
    assert len(found) == 3
    assert "".join(found) == lines
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    stream("create", "again", tmp_path / "log.jsonl")
    assert exported("again", capsys) == found


def test_find_text_finds_every_place_across_pieces(text, capsys, monkeypatch):
    stream("create", "hay", text)
    tokens = Arrays(streams.stream_folder("hay"))
    tokenizer, whole = get_tokenizer(), "<|bos|>" + "<|bos|>".join(documents_of(text))
    for needle in ("import", "def ", "鯨", "a" * 200):
        monkeypatch.setattr("nanochat.find.PIECE_TOKENS", 97)
        n = tokens.rows("tokens")
        found = list(find_text(partial(streams.token_ids, tokens), tokenizer, needle, 0, n))
        assert len(found) == whole.lower().count(needle.lower())
        middle = list(find_text(partial(streams.token_ids, tokens), tokenizer, needle.upper(), n // 3, n // 2))
        assert middle == [place for place in found if n // 3 <= place[0] < n // 2]
        for start, end in found:
            assert needle.lower() in tokenizer.decode(streams.token_ids(tokens, start, end)).lower()


@pytest.mark.parametrize("when", [0.0, 0.4])
def test_an_ingestion_that_was_killed_goes_on_and_the_stream_is_the_same(text, capsys, monkeypatch, when):
    monkeypatch.setattr(streams, "INGEST_CHARS", 2000)
    stream("create", "whole", text)
    command = [sys.executable, "-c", SLOW, "create", "cut", str(text), *CPU, "--step=3"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    folder = streams.stream_folder("cut")

    log = folder / f"{FILE}-wal"
    until(lambda: log.exists() and log.stat().st_size > 50_000, 60)
    time.sleep(when)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = Arrays(folder).rows("tokens")
    stream("append", "cut", text)
    assert kept < Arrays(folder).rows("tokens")
    assert exported("cut", capsys) == documents_of(text)
    assert rows_of("cut") == rows_of("whole")


SLOW = """
import time
from megacontext import streams
from nanochat.configurator import run
from scripts import mc_stream
streams.INGEST_CHARS, streams.SPILL_TOKENS, ingest = 2000, 100, streams.ingest
def slow(*args):
    for done in ingest(*args, commit_seconds=0.0):
        time.sleep(0.05)
        yield done
streams.ingest = slow
run(mc_stream.main, mc_stream.Config)
"""


def rows_of(name):
    """The bytes of all arrays of a stream."""
    found = {}
    for folder in (streams.stream_folder(name), *streams.gist_sets(streams.stream_folder(name))):
        arrays = Arrays(folder)
        found |= {name: arrays.slice(name, 0, arrays.rows(name)).tobytes() for name in arrays.names}
    return found


def test_a_wrong_path_leaves_no_stream_and_the_right_one_works_then(text, capsys):
    with pytest.raises(UserError, match="wrong is not there"):
        stream("create", "hay", text, text / "wrong")
    assert not streams.stream_folder("hay").exists()
    stream("create", "hay", text / "more")
    assert exported("hay", capsys) == documents_of(text / "more")


def test_another_model_gets_its_gists_and_compact_drops_the_old(text, capsys):
    stream("create", "hay", text)
    folder = streams.stream_folder("hay")
    stream("append", "hay", step=4)
    assert len(streams.gist_sets(folder)) == 2
    stream("create", "new", text, step=4)
    with closing(Arrays(folder, write=True)) as tokens:
        n, path = tokens.rows("tokens"), tokens.path
        tokens.append("tokens", np.zeros((300_000, 1)), "uint16")
        tokens.commit()
        tokens.truncate({"tokens": n})
    assert path.stat().st_size > 600_000
    stream("compact", "hay", step=4)
    assert rows_of("hay") == rows_of("new")
    assert path.stat().st_size < 300_000
    content = bytearray(path.read_bytes())
    content[content.index(rows_of("hay")["tokens"][:100])] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="arrays.sqlite: rows 0 and following of tokens are damaged"):
        stream("compact", "hay", step=4)
    path.write_bytes(b"")
    stream("list")
    assert "hay  cannot be read: " in capsys.readouterr().out


def test_a_chat_about_a_stream(text, capsys):
    stream("create", "hay", text)
    size = Arrays(streams.stream_folder("hay")).rows("tokens")
    call_script("chat_cli", ["--mc", "--stream=hay", "--step=3", "-p", "Where?", "-m", "9", "--mc_show_focus", *CPU])
    assert f"{size:,}"[:3] in capsys.readouterr().out
    assert Arrays(streams.stream_folder("hay")).rows("tokens") == size
    call_script("chat_cli", ["--mc", "--stream=hay", "--step=4", "-p", "Where?", "-m", "9", *CPU])  # by the old gists
    [gists] = streams.gist_sets(streams.stream_folder("hay"))
    shutil.rmtree(gists)
    with pytest.raises(UserError, match="have no gists of this model yet: run python -m scripts.mc_stream append hay"):
        call_script("chat_cli", ["--mc", "--stream=hay", "--step=4", "-p", "Where?", *CPU])
    with pytest.raises(UserError, match="there is none called 'straw'"):
        call_script("chat_cli", ["--mc", "--stream=straw", "-p", "Where?", *CPU])
    with pytest.raises(UserError, match="expected --mc with it"):
        call_script("chat_cli", ["--stream=hay", "-p", "Where?", *CPU])


def test_a_server_whose_chats_are_about_a_stream(text, capsys):
    """Each begins where the stream ends, beside others, and leaves nothing in it; it can be looked at and deleted."""
    stream("create", "hay", text)
    tokens = Arrays(streams.stream_folder("hay"))
    size = tokens.rows("tokens")
    config = chat_web.Config(mc=True, stream="hay", step=3, device_type="cpu", dtype="fp32")
    engine, model, sessions = chat_web.load(config, torch.device("cpu"))
    with serving(engine, model=model, sessions=[sessions], batch_size=4) as server:
        post = server.client.post
        assert server.client.get("/config").json()["mc"]["past"] == size

        def chat(name, content="Where is the white whale?"):
            options = {"conversation": name, "focus": True, "temperature": 0, "max_tokens": 9}
            return ask(server, [{"role": "user", "content": content}], **options)

        names = [f"conversation-number-{i:04}" for i in range(3)]
        with ThreadPoolExecutor(3) as clients:
            replies = list(clients.map(chat, names))
        assert replies[0][-1]["done"]
        assert said(replies[0]) == said(replies[1]) == said(replies[2]) == said(chat(names[0]))
        focus = [event["focus"] for event in replies[0] if "focus" in event]
        assert all(size < state["num_tokens"] < size + 200 and state["entries"] <= 40 for state in focus)
        spans = [[0, size], [size, size + 99]]
        early, late = post("/focus/text", json={"conversation": names[1], "spans": spans}).json()["texts"]
        assert early.strip()[:30] in get_tokenizer().decode(streams.token_ids(tokens, 0, 200))
        assert "Where is the white whale?" in late
        assert post("/forget", json={"conversation": names[1]}).status_code == 200
        assert post("/focus", json={"conversation": names[1]}).json() == {"focus": None}
        until(server.pool.is_idle)
    for held in sessions.held:
        held.session.close()
    assert Arrays(streams.stream_folder("hay")).rows("tokens") == size
