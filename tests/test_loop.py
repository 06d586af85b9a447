"""Batch arithmetic, schedules, logs, resuming rules, Engine."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Annotated

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import loop
from nanochat.common import JSONLines, UserError, get_base_dir, peak_flops
from nanochat.configurator import OptionalInt, parse, short
from nanochat.dataset import make_local
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.loss_eval import evaluate_bpb
from tests.helpers import ROOT, likeliest, make_model


@pytest.mark.parametrize(
    ("args", "steps"), [((524288, 32, 2048, 8), 1), ((524288, 32, 2048, 1), 8), ((512, 1, 512, 1), 1)]
)
def test_accumulation(args, steps):
    assert loop.accumulation_steps(*args) == steps


def test_accumulation_that_does_not_divide():
    with pytest.raises(UserError, match=r"= 32 × 2048 × 3 = 196,608, got 524,288; --total_batch_size=589824 fits"):
        loop.accumulation_steps(524288, 32, 2048, 3)
    with pytest.raises(UserError, match="--total_batch_size=1024 fits"):
        loop.accumulation_steps(512, 2, 512, 1)


def test_lr_multiplier():
    at = [loop.lr_multiplier(step, 10, 0.2, 0.4, 0.0) for step in range(11)]
    assert at == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert loop.lr_multiplier(10, 10, 0, 0.4, 0.1) == pytest.approx(0.1)
    assert loop.lr_multiplier(3, 10) == 1.0
    assert [loop.muon_momentum(s) for s in (0, 150, 300, 9000)] == pytest.approx([0.85, 0.9, 0.95, 0.95])


def test_run_log(base_dir):
    log = loop.RunLog("base", "d1", "dummy", {}, resumed=False)
    log.log({"step": 1, "train/loss": 2.5, "val/bpb": float("nan")})
    log.finish()
    path = get_base_dir() / "logs" / "base_d1.jsonl"
    assert json.loads(path.read_text()) == {"step": 1, "train/loss": 2.5, "val/bpb": None}
    with open(path, "a") as file:
        file.write('{"step": 2, "tra')  # killed in the middle of a line
    resumed = loop.RunLog("base", "d1", "dummy", {}, resumed=True)
    resumed.log({"step": 2})
    resumed.finish()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
    loop.RunLog("base", "d1", "dummy", {}, resumed=False).finish()
    assert path.read_text() == ""
    assert len(list(path.parent.glob("base_d1.*.old"))) == 1  # the earlier run's log is kept


def test_a_full_disk_ends_no_training(base_dir, capsys):
    log = loop.RunLog("base", "d1", "dummy", {}, resumed=False)
    log.file.close()
    log.file = JSONLines("/dev/full")
    seen = []
    log.listen(SimpleNamespace(metrics=seen.append, close=lambda: None))
    log.log({"step": 1})
    log.log({"step": 2})
    log.finish()
    assert capsys.readouterr().out == "the run continues without /dev/full: No space left on device\n"
    assert seen == [{"step": 1}, {"step": 2}]


def test_a_log_that_cannot_be_written_ends_no_training(base_dir, capsys):
    get_base_dir()
    (base_dir / "logs").write_text("a file where the folder should be")
    loop.RunLog("base", "d1", "dummy", {}, resumed=False).log({"step": 1})
    assert "there will be no log" in capsys.readouterr().out


class FakeWandb:
    """In place of the package: `init` and what it gives fail as told."""

    Settings = dict

    def __init__(self, fails):
        self.fails, self.calls, self.id = fails, [], "abc"

    def init(self, **options):
        self.calls.append(options)
        if "offline" in self.fails or ("init" in self.fails and options.get("mode") != "offline"):
            raise ConnectionError("the server does not answer")
        return self

    def log(self, metrics):
        if "log" in self.fails:
            raise BrokenPipeError("the service is gone")

    def finish(self):
        if "finish" in self.fails:
            raise TimeoutError("it takes too long")


@pytest.mark.parametrize("fails", [[], ["init"], ["init", "offline"], ["log"], ["finish"]])
def test_wandb_ends_no_training(fails, base_dir, monkeypatch, capsys):
    fake = FakeWandb(fails)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = loop.RunLog("sft", "d1", "mine", {"a": 1}, resumed=True, wandb_id="abc")
    log.log({"step": 1})
    log.log({"step": 2})
    log.finish()
    assert fake.calls[0]["project"] == "nanochat-sft"
    assert len(fake.calls) == 1 + ("init" in fails)
    assert log.wandb_id == "abc"  # the next stretch of the run still belongs to it
    out = capsys.readouterr().out
    told = {"init": "`wandb sync` sends it later", "offline": "nothing is kept", "log": "gone", "finish": "long"}
    for name, text in told.items():
        assert out.count(text) == (name in fails)
    log_file = base_dir / "logs" / "sft_d1.jsonl"
    assert [json.loads(line)["step"] for line in log_file.read_text().splitlines()] == [1, 2]


def test_wandb_is_checked_before_a_recipe(monkeypatch):
    class Api:
        def __init__(self, timeout):
            raise ConnectionError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=Api))
    loop.check_wandb("mine")  # WANDB_MODE=disabled in tests
    monkeypatch.delenv("WANDB_MODE")
    loop.check_wandb("dummy")
    with pytest.raises(UserError, match=r"W&B cannot be used \(no API key\): log in .* WANDB_MODE=offline"):
        loop.check_wandb("mine")


def test_the_real_wandb_without_a_key(tmp_path):
    code = "from nanochat import loop; log = loop.RunLog('base', 'd1', 'mine', {}, False)"
    code += "; log.log({'step': 1, 'train/loss': 2.0}); log.finish()"
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": "",
        "WANDB_DIR": str(tmp_path),
        "HOME": str(tmp_path),
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    assert "W&B: No API key configured" in result.stdout
    assert "`wandb sync` sends it later" in result.stdout
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_progress_without_a_terminal(capsys):
    line = loop.ProgressLine("base", total=100, start=40, every=0.0)
    line.update(41, "loss 1.0")
    line.began -= 9
    line.update(50, "loss 0.5")
    line.say("hello")
    line.close()
    out = capsys.readouterr().out.splitlines()
    assert out == ["step 41/100 | loss 1.0 | ? left", "step 50/100 | loss 0.5 | 0m50s left", "hello"]


def test_bits_per_byte_against_arithmetic():
    model = make_model(GPTConfig(8, 70, 1, 2, 2, 16))
    token_bytes = torch.randint(0, 5, (70,), dtype=torch.int32)
    token_bytes[:10] = 0  # special tokens
    batches = []
    for _ in range(3):
        x, y = torch.randint(0, 70, (2, 2, 8))
        y[0, 0] = -1
        batches.append((x, y))
    nats = count = 0
    for x, y in batches:
        logs = torch.log_softmax(model(x), -1)
        for row in range(2):
            for t in range(8):
                target = y[row, t].item()
                if target >= 0 and token_bytes[target] > 0:
                    nats -= logs[row, t, target].item()
                    count += token_bytes[target].item()
    expected = nats / count / 0.6931471805599453
    assert evaluate_bpb(model, iter(batches), 3, token_bytes) == pytest.approx(expected, rel=1e-5)
    nothing = [(x, torch.full_like(y, -1)) for x, y in batches]
    assert evaluate_bpb(model, iter(nothing), 3, token_bytes) == float("inf")


def test_peak_flops_of_this_gpu(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, flops in [("NVIDIA H200", 989e12), ("NVIDIA GeForce RTX 5090", 209.5e12), ("Unknown 1", None)]:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda", 0)) == flops


# ---------------------------------------------------------------------------------------------------------
# Command lines


@dataclass
class Options:
    """A test."""

    source: Annotated[str, short("-i")] = "sft"
    """where from"""
    max_tokens: int = 5
    """how many"""
    use_mc: bool = False
    """a switch"""
    auto: bool = True
    """another"""
    step: Annotated[OptionalInt, short("-s")] = None
    """which one; -1 for the newest"""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--max_tokens=7"], {"max_tokens": 7}),
        (["--max_tokens", "7"], {"max_tokens": 7}),
        (["--max-tokens=7"], {"max_tokens": 7}),
        (["--max-tokens", "-1"], {"max_tokens": -1}),
        (["--", "-i", "mid"], {"source": "mid"}),
        (["--source=mid"], {"source": "mid"}),
        (["--use_mc"], {"use_mc": True}),
        (["--use-mc", "--max_tokens", "1"], {"use_mc": True, "max_tokens": 1}),
        (["--use_mc=1", "--auto=0"], {"use_mc": True, "auto": False}),
        (["--use_mc", "1", "--auto", "false"], {"use_mc": True, "auto": False}),
        (["--use_mc=True", "--auto", "no"], {"use_mc": True, "auto": False}),
        (["--step=-1"], {}),
        (["-s", "-1"], {}),
        (["-s", "0"], {"step": 0}),
        (["--step", "12"], {"step": 12}),
    ],
)
def test_command_line_forms(argv, expected):
    assert asdict(parse(Options, argv)) == {**asdict(Options()), **expected}


@pytest.mark.parametrize(
    "argv", [["--max_tokens=many"], ["--nonsense=1"], ["stray"], ["--use_mc=maybe"], ["--step=new"]]
)
def test_bad_command_lines_end_with_a_message(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, argv)
    assert stop.value.code not in (0, None)
    assert argv[0].split("=")[0].strip("-") in capsys.readouterr().err


def test_a_settings_file_is_read_and_never_run(tmp_path):
    path = tmp_path / "small.py"
    path.write_text('"""Small."""\nmax_tokens = -7\nsource = "a b"  # a comment\nuse_mc = True\nauto = False\n')
    expected = {"source": "a b", "max_tokens": -7, "use_mc": True, "auto": False, "step": None}
    assert asdict(parse(Options, [str(path)])) == expected
    assert asdict(parse(Options, ["--", str(path), "--max_tokens=2", "-s", "3"])) == {
        **expected,
        "max_tokens": 2,
        "step": 3,
    }


@pytest.mark.parametrize(
    "line",
    ["import os", "max_tokens = open('ran', 'w').close()", "max_tokens = 2 ** 9", "print(open('ran', 'w'))", "a.b = 3"],
)
def test_a_settings_file_with_more_than_literals(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(f"source = 'x'\n{line}\n")
    with pytest.raises(UserError, match=r"small.py, line 2: expected a name and a literal value, .* is not run"):
        parse(Options, ["small.py"])
    assert not (tmp_path / "ran").exists()


def test_a_settings_file_that_is_none(tmp_path, capsys):
    (tmp_path / "small.py").write_text("depth == = 3")
    for name in ("small.py", "absent.py"):
        with pytest.raises(UserError, match=f"{name} cannot be read as a file of settings"):
            parse(Options, [str(tmp_path / name)])
    (tmp_path / "small.py").write_text("tokens = 3")  # no option of this script
    with pytest.raises(SystemExit):
        parse(Options, [str(tmp_path / "small.py")])
    assert "--tokens" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--help"])
    assert stop.value.code in (0, None)
    out = capsys.readouterr().out
    assert "--max_tokens" in out
    assert "how many" in out


# ---------------------------------------------------------------------------------------------------------
# Engine


@pytest.fixture(scope="module")
def model():
    return make_model(GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=32), seed=3)


def test_engine_equals_the_naive_way(model, tokenizer):
    engine = Engine(model, tokenizer)
    prompt = tokenizer.encode("def double(x", prepend="<|bos|>")
    ids, masks = engine.generate_batch(prompt, num_samples=2, max_tokens=20, temperature=0)
    naive = list(likeliest(model, prompt, 20))
    ends = {tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()}
    until = next((i for i, token in enumerate(naive) if token in ends), len(naive))
    assert ids[0] == ids[1] == prompt + naive[:until]
    assert masks[0] == [0] * len(prompt) + [1] * until


def test_rows_are_sampled_one_by_one(model, tokenizer):
    engine = Engine(model, tokenizer)
    column, mask = next(engine.generate([291], num_samples=64, temperature=1.0))
    assert len(set(column)) > 5  # the fork point gave every row the same first token
    assert mask == [1] * 64
    again, _ = next(engine.generate([291], num_samples=64, temperature=1.0))
    other, _ = next(engine.generate([291], num_samples=64, temperature=1.0, seed=1))
    assert again == column != other
    assert len(list(engine.generate([291], max_tokens=0))) == 0
    with pytest.raises(ValueError, match="at least one token"):
        next(engine.generate([]))


class Script:
    """A session that makes the model 'say' given tokens, row by row."""

    wish = None

    def __init__(self, rows):
        self.rows, self.t, self.seen = rows, -1, []

    def _logits(self):
        self.t += 1
        logits = torch.full((len(self.rows), 300), -100.0)
        for i, row in enumerate(self.rows):
            logits[i, row[min(self.t, len(row) - 1)]] = 100.0
        return logits

    def prefill(self, tokens):
        return self._logits()

    def read(self, ids):
        self.seen.append(ids.tolist())
        return self._logits()


def test_tool_calls(model, tokenizer):
    special, encode = tokenizer.encode_special, tokenizer.encode
    call = [special("<|python_start|>"), *encode("12*12"), special("<|python_end|>")]
    answer = [special("<|output_start|>"), *encode("144"), special("<|output_end|>")]
    end, filler = special("<|assistant_end|>"), encode("x")[0]
    with_tool = [*call, *[filler] * len(answer), *encode("ok"), end]
    refused = [special("<|python_start|>"), *encode("import os"), special("<|python_end|>"), end]
    session = Script([with_tool, refused])
    ids, masks = Engine(model, tokenizer).generate_batch([5], 2, temperature=0, session=session)
    assert ids[0] == [5, *call, *answer, *encode("ok")]
    assert masks[0] == [0, *[1] * len(call), *[0] * len(answer), *[1] * len(encode("ok"))]
    assert ids[1] == [5, *refused[:-1]]
    assert masks[1] == [0] + [1] * (len(refused) - 1)


# ---------------------------------------------------------------------------------------------------------
# Micro-batches


def test_passes_or_steps():
    assert loop.passes(100, -1, 2, 50) == 4
    assert loop.passes(100, 3, 2, 50) == 3
    with pytest.raises(UserError, match="100 conversations are less than one step of 101"):
        loop.passes(100, -1, 1, 101)


@pytest.fixture
def corpus(base_dir, tmp_path, tokenizer):
    """30 documents of different lengths in 8 or more row groups, with the tokenizer that reads them."""
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"document {i} " * (5 + i % 7))
    make_local(str(text), -1, base_dir / "base_data")
    return tokenizer


def take(corpus, monkeypatch, count, world_size=1, rank=0, **options):
    """The rows of the first `count` micro-batches of a rank, and the state after them."""
    monkeypatch.setattr(loop, "get_dist_info", lambda: (world_size > 1, rank, rank, world_size))
    batches = loop.MicroBatches(corpus, 2, 8, "cpu", **options)
    try:
        rows = [next(batches) for _ in range(count)]
        return rows, batches.state_dict()
    finally:
        batches.close()


@pytest.mark.parametrize("streams", [1, 2])
def test_any_number_of_processes_gets_the_same_tokens(corpus, monkeypatch, streams):
    alone, _ = take(corpus, monkeypatch, 6, accumulation=2, streams=streams)  # three steps of two
    shared = [take(corpus, monkeypatch, 3, 2, rank, accumulation=1, streams=streams)[0] for rank in (0, 1)]
    for step in range(3):
        for rank in (0, 1):
            for mine, theirs in zip(shared[rank][step], alone[2 * step + rank], strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("piece", [-1, 5])
def test_micro_batches_go_on_from_their_state(piece, corpus, monkeypatch):
    whole, _ = take(corpus, monkeypatch, 8, accumulation=2, streams=2, piece=piece)
    _, state = take(corpus, monkeypatch, 4, accumulation=2, streams=2, piece=piece)
    rest, _ = take(corpus, monkeypatch, 4, accumulation=2, streams=2, state=state, piece=piece)
    for (x, y), (x2, y2) in zip(whole[4:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    with pytest.raises(UserError, match="streams must divide the device_batch_size of 2, got 3"):
        take(corpus, monkeypatch, 1, accumulation=1, streams=3)


def test_another_batch_size_goes_on_in_the_same_streams(corpus, monkeypatch):
    """After running out of memory: half the rows, twice as many micro-batches, and the very same text."""
    whole, _ = take(corpus, monkeypatch, 4, accumulation=1)
    _, state = take(corpus, monkeypatch, 2, accumulation=1)
    monkeypatch.setattr(loop, "list_row_groups", lambda split: [None])  # too few for more than one stream
    batches = loop.MicroBatches(corpus, 1, 8, "cpu", accumulation=2, state=state)
    rest = [next(batches) for _ in range(4)]
    batches.close()
    for i, (x, y) in enumerate(rest):
        assert torch.equal(x[0], whole[2 + i // 2][0][i % 2])
        assert torch.equal(y[0], whole[2 + i // 2][1][i % 2])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12), st.data())
def test_streams_are_shared_out_anew(groups, before, now, data):
    """No row group that was begun is begun again in this epoch, and the ones after it are all read in turn."""
    before, now = min(before, groups), min(now, groups)
    rounds = data.draw(st.lists(st.integers(0, groups), min_size=before, max_size=before))
    states = []
    for number, rounded in enumerate(rounds):
        mine = range(number, groups, before)
        epoch, turn = divmod(rounded, len(mine))
        states.append({"epoch": epoch, "row_group": mine[turn], "token": 3, "rank": number, "world_size": before})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "list_row_groups", lambda split: [None] * groups)
        continued = loop._states_of(states, range(now), now)
    if before == now:
        assert continued == states
        return
    begun = max((state["epoch"], state["row_group"]) for state in states)
    assert [(p["rank"], p["world_size"], p["token"]) for p in continued] == [(i, now, 0) for i in range(now)]
    assert all(state["row_group"] % now == state["rank"] for state in continued)
    assert all((state["epoch"], state["row_group"]) > begun for state in continued)
    ahead = {
        group for state in continued if state["epoch"] == begun[0] for group in range(state["row_group"], groups, now)
    }
    assert ahead == set(range(begun[1] + 1, groups))


def test_too_few_row_groups_for_the_streams(corpus, monkeypatch):
    rows, state = take(corpus, monkeypatch, 4, accumulation=1000, streams=2)
    assert len(state) == 2
    assert not torch.equal(rows[0][0], rows[1][0])  # the one set of streams goes on
