"""The CORE metric against a row-by-row reference, its arithmetic, and what it says about broken bundles."""

import csv
import functools
import http.server
import json
import os
import random
import re
import shutil
import threading
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from nanochat import core_bundle, pretrained
from nanochat.common import UserError
from nanochat.core_bundle import TaskMeta, download_bundle, load_bundle
from nanochat.core_eval import centered, evaluate_core, evaluate_task, is_correct, render_prompts, scored_rows
from scripts import base_eval
from tests.helpers import CORE_BUNDLE as BUNDLE
from tests.helpers import in_ranks

V = 7  # so few tokens that a random model is right now and then


@pytest.fixture(autouse=True)
def bundle(tmp_path, monkeypatch):
    """A copy of the bundle where the scripts look for it."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(BUNDLE, tmp_path / "eval_bundle"))


class WordTokenizer:
    """A word, with the space before it, is a token; so text boundaries inside a prompt do matter."""

    def get_bos_token_id(self):
        return 0

    def encode(self, text, prepend):
        if isinstance(text, list):
            return [self.encode(one, prepend) for one in text]
        words = re.findall(r" ?\w+|\s+|[^\w\s]", text)
        return [prepend, *(1 + zlib.crc32(word.encode()) % (V - 1) for word in words)]


class HashModel:
    """Logits at t depend on all tokens up to t and on nothing after: causal, deterministic, erratic."""

    def __init__(self, seed, max_seq_len=None):
        self.table = torch.randn(101, V, generator=torch.Generator().manual_seed(seed))
        self.max_seq_len = max_seq_len
        self.calls = []

    def row(self, tokens):
        state, states = 1, []
        for token in tokens:
            state = (state * 31 + token + 7) % 101
            states.append(state)
        return self.table[states]

    def __call__(self, ids):
        assert self.max_seq_len is None or ids.size(1) <= self.max_seq_len
        self.calls.append(ids.shape)
        return torch.stack([self.row(row) for row in ids.tolist()])


def reference_prompts(item, task_type, delimiter, shots):
    """The prompts spelled out for each type by itself."""
    text = ""
    if task_type == "multiple_choice":
        for shot in shots:
            text += str(shot["query"]) + delimiter + str(shot["choices"][shot["gold"]]) + "\n\n"
        return [text + item["query"] + delimiter + str(choice) for choice in item["choices"]]
    if task_type == "schema":
        for shot in shots:
            text += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"] + "\n\n"
        return [text + context + delimiter + item["continuation"] for context in item["context_options"]]
    for shot in shots:
        text += shot["context"].strip() + delimiter + shot["continuation"] + "\n\n"
    return [(text + item["context"].strip() + delimiter).rstrip(), item["continuation"], delimiter]


def reference_loss(model, tokens, first):
    """Mean loss of tokens[first:], one forward pass a token, each on no more than the model takes."""
    losses = []
    limit = model.max_seq_len or 10**9
    start = max(0, len(tokens) - limit)  # what is cut is cut once, from the whole row
    for t in range(max(first, start + 1), len(tokens)):
        losses.append(-torch.log_softmax(model.row(tokens[start:t])[-1], dim=0)[tokens[t]].item())
    return sum(losses) / len(losses)


def reference_is_correct(model, tokenizer, data, index, meta):
    others = data[:index] + data[index + 1 :]
    shots = random.Random(1234 + index).sample(others, meta.num_fewshot)
    item = data[index]
    prompts = reference_prompts(item, meta.task_type, meta.continuation_delimiter, shots)
    if meta.task_type == "language_modeling":  # let the model speak greedily and compare
        bare, continuation, delimiter = prompts
        said = tokenizer.encode(bare, 0)
        full = reference_prompts(item, "language_modeling", delimiter, shots)[0]
        full = tokenizer.encode(full + delimiter[len(delimiter.rstrip()) :] + continuation, 0)
        cut = max(0, len(full) - (model.max_seq_len or 10**9))
        while len(said) < len(full):
            said.append(model.row(said[cut:])[-1].argmax().item())
        return said == full
    rows = [tokenizer.encode(prompt, 0) for prompt in prompts]
    if meta.task_type == "multiple_choice":
        first = 0
        while all(len(row) > first + 1 for row in rows) and len({row[first] for row in rows}) == 1:
            first += 1
        losses = [reference_loss(model, row, first) for row in rows]
    else:
        same = 0
        while same < min(map(len, rows)) and len({row[-1 - same] for row in rows}) == 1:
            same += 1
        losses = [reference_loss(model, row, len(row) - same) for row in rows]
    return min(range(len(losses)), key=losses.__getitem__) == item["gold"]


@pytest.mark.parametrize("max_seq_len", [None, 12, 5])
def test_equals_reference(max_seq_len):
    tokenizer, answers = WordTokenizer(), []
    for seed in range(6):
        model = HashModel(seed, max_seq_len)
        for meta, data in load_bundle():
            for index in range(len(data)):
                expected = reference_is_correct(model, tokenizer, data, index, meta)
                assert is_correct(model, tokenizer, data, index, "cpu", meta) == expected, (seed, meta, index)
                answers.append((meta.task_type, expected))
    assert len(set(answers)) == 6  # each type was right at times and wrong at times


def test_evaluate_core():
    model, tokenizer, seen = HashModel(3), WordTokenizer(), []
    core = evaluate_core(model, tokenizer, "cpu", progress=lambda *args: seen.append(args))
    baselines = {"tiny_facts": 0.25, "tiny_pronouns": 0.5, "tiny_sequences": 0.0}
    assert list(core["results"]) == list(baselines)
    for meta, data in load_bundle():
        right = sum(reference_is_correct(model, tokenizer, data, i, meta) for i in range(12))
        assert core["results"][meta.label] == right / 12
        expected = (right / 12 - baselines[meta.label]) / (1 - baselines[meta.label])
        assert core["centered_results"][meta.label] == pytest.approx(expected)
    assert core["core_metric"] == pytest.approx(sum(core["centered_results"].values()) / 3)
    assert seen[0] == ("tiny_facts", 1, 36)
    assert seen[-1] == ("tiny_sequences", 36, 36)
    assert len(model.calls) == 36  # one forward pass an item
    again = evaluate_core(model, tokenizer, "cpu")
    assert again == core


def test_centered():
    assert centered(1.0, 0.25) == 1.0
    assert centered(0.25, 0.25) == 0.0
    assert centered(0.5, 0.0) == 0.5
    assert centered(0.0, 0.5) == -1.0


def test_subset_is_a_fixed_shuffle():
    whole, part = load_bundle(), load_bundle(5)
    for (meta, data), (_, few) in zip(whole, part, strict=True):
        assert few == data[:5]
        lines = (BUNDLE / "eval_data" / meta.dataset_uri).read_text().splitlines()
        expected = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(expected)
        assert data == expected
    core = evaluate_core(HashModel(0), WordTokenizer(), "cpu", max_per_task=4)
    assert all(accuracy * 4 == int(accuracy * 4) for accuracy in core["results"].values())


def test_too_few_examples():
    with pytest.raises(UserError, match=r"tiny_facts: 2 examples .* only 2 items: look at more than 2 of each task"):
        load_bundle(2)


def test_trailing_space_stays_with_the_word():
    """The bare prompt must not end with the space that belongs to the next word's token."""
    item = {"context": " A dozen is ", "continuation": "twelve"}
    bare, full = render_prompts(item, "language_modeling", " ", [])
    assert (bare, full) == ("A dozen is", "A dozen is twelve")
    ((row, start),) = scored_rows(WordTokenizer().encode([bare, full], 0), "language_modeling")
    assert row[start:] == WordTokenizer().encode(" twelve", 0)[1:]


def test_one_choice_begins_another():
    rows = [[0, 5, 6, 1], [0, 5, 6, 1, 2, 3]]
    assert scored_rows(rows, "multiple_choice") == [(rows[0], 3), (rows[1], 3)]


def test_merge_over_the_boundary():
    """Where the prompt alone tokenizes otherwise, all that differs is scored."""
    assert scored_rows([[0, 1, 2], [0, 1, 9, 3]], "language_modeling") == [([0, 1, 9, 3], 2)]


tokens = st.lists(st.integers(1, 3), max_size=8)


@given(tokens, st.lists(tokens.filter(len), min_size=2, max_size=4), st.integers(2, 20))
def test_scored_rows_properties(context, endings, limit):
    for task_type in ("multiple_choice", "schema"):
        rows = [[0, *context, *ending] for ending in endings]
        if task_type == "schema":
            rows = [[0, *ending, *context] for ending in endings]
        for (row, start), (cut, cut_start), whole in zip(
            scored_rows(rows, task_type), scored_rows(rows, task_type, limit), rows, strict=True
        ):
            assert row == whole
            assert 1 <= start <= len(row)
            assert cut == whole[-limit:]
            assert cut[cut_start:] == row[start:][-(limit - 1) :] if row[start:] else cut_start == len(cut)
            if task_type == "schema":
                assert context == [] or row[start:][-len(context) :] == context[-len(row[start:]) :]
            else:
                assert start >= min(len(context) + 1, len(row) - 1)


# ---------------------------------------------------------------------------------------------------------
# Several processes


def evaluate_a_share(folder):
    """Evaluate as one process of two."""
    dist.init_process_group("gloo")
    model = HashModel(3)
    core = evaluate_core(model, WordTokenizer(), torch.device("cpu"), 5)
    (folder / os.environ["RANK"]).write_text(json.dumps([core, len(model.calls)]))
    dist.barrier()


def test_two_processes_share_the_work(tmp_path):
    alone = evaluate_core(HashModel(3), WordTokenizer(), "cpu", 5)
    in_ranks(2, evaluate_a_share, tmp_path)
    answers = [json.loads((tmp_path / rank).read_text()) for rank in ("0", "1")]
    assert [core for core, _ in answers] == [alone, alone]
    assert sorted(calls for _, calls in answers) == [6, 9]  # 3 tasks of 5 items: 3 and 2 each


# ---------------------------------------------------------------------------------------------------------
# Bundles that are not as they should be


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


FACTS = "eval_data/tiny/facts.jsonl"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("core.yaml", "icl_tasks:", "tasks:", "core.yaml: expected a list of tasks under the key icl_tasks"),
        ("core.yaml", "icl_tasks:", "icl_tasks: [", "core.yaml is not valid YAML: (?s:.*)line"),
        ("core.yaml", "  num_fewshot: [2]\n", "", "core.yaml, task 'tiny_facts': .*'num_fewshot' is missing"),
        ("core.yaml", "[2]", "2", "core.yaml, task 'tiny_facts': num_fewshot must be a list"),
        ("core.yaml", "multiple_choice", "essay", "icl_task_type must be one of .*schema.*, got 'essay'"),
        ("core.yaml", "tiny_facts", "tiny_fax", "eval_meta_data.csv: no line for the task 'tiny_fax'"),
        ("core.yaml", "tiny/facts.jsonl", "tiny/gone.jsonl", r"cannot read .*gone\.jsonl"),
        ("core.yaml", "tiny_pronouns", "tiny_facts", "each label must occur once"),
        ("eval_meta_data.csv", "Random baseline", "Baseline", "csv, line 1: .* column 'Random baseline'"),
        ("eval_meta_data.csv", ",50,", ",half,", "csv, line 3: Random baseline must be .*'half'"),
        (
            "eval_meta_data.csv",
            ",25,",
            ",100,",
            "csv, line 2: Random baseline must be .* below 100, got '100'",
        ),
        (FACTS, '"choices": ["six"', '"choices: ["six"', r"facts\.jsonl, line 1: not valid JSON"),
        (FACTS, '"gold": 2}', '"god": 2}', r"facts\.jsonl, line 2: .* needs the key 'gold'"),
        (FACTS, '"gold": 2}', '"gold": 4}', r"facts\.jsonl, line 2: 'gold' must be the index of one of 4"),
        (FACTS, '"gold": 2}', '"gold": "2"}', r"facts\.jsonl, line 2: 'gold' must be an index, got '2'"),
        (FACTS, '["six", "eight"', '[["six"], "eight"', r"line 1: 'choices' must be a list of texts"),
        (FACTS, '"six"', '""', r"facts\.jsonl, line 1: a continuation is empty"),
        (FACTS, '{"query": "Which month', '7 {"query": "', r"facts\.jsonl, line 6: not valid JSON"),
    ],
)
def test_malformed(bundle, file, old, new, message):
    load_bundle()
    edit(bundle / file, old, new)
    with pytest.raises(UserError, match=message):
        load_bundle()


def test_line_that_is_no_object_and_empty_file(bundle):
    (bundle / FACTS).write_text("[1, 2]\n")
    with pytest.raises(UserError, match=r"facts\.jsonl, line 1: expected a JSON object, got list"):
        load_bundle()
    (bundle / FACTS).write_text("\n")
    with pytest.raises(UserError, match="expected one JSON object per line, got an empty file"):
        load_bundle()
    (bundle / FACTS).write_bytes(b'{"query": "\xff"}\n')
    with pytest.raises(UserError, match=r"facts\.jsonl:1: expected UTF-8, got the byte 0xff"):
        load_bundle()


def test_line_separators_inside_strings(bundle):
    item = {"query": "a\u2028b\x0bc", "choices": ["d", "e"], "gold": 0}
    with open(bundle / FACTS, "a") as file:
        file.write(json.dumps(item, ensure_ascii=False) + "\n")
    (_, data), *_ = load_bundle()
    assert item in data


def test_missing_bundle_says_how_to_get_it(bundle):
    shutil.rmtree(bundle)
    with pytest.raises(UserError, match=r"scripts.prepare`.*eval_bundle\.zip"):
        load_bundle()


# ---------------------------------------------------------------------------------------------------------
# Download


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder, and the address under which it is served."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
        thread.start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize("top", ["eval_bundle", "."])
def test_download(server, tmp_path, monkeypatch, top):
    folder, url = server
    ours = load_bundle()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with zipfile.ZipFile(folder / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in BUNDLE.rglob("*"):
            archive.write(path, Path(top) / path.relative_to(BUNDLE))
    target = tmp_path / "base" / "eval_bundle"
    assert download_bundle(f"{url}/b.zip") == target
    assert load_bundle() == ours
    assert [path.name for path in target.parent.iterdir()] == ["eval_bundle"]  # nothing else is left over
    (folder / "b.zip").unlink()
    download_bundle(f"{url}/b.zip")  # there already, so nothing is fetched


def test_download_faults(server, tmp_path, monkeypatch):
    folder, url = server
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    target = tmp_path / "base" / "eval_bundle"
    with pytest.raises(UserError, match=r"could not download .*404"):
        download_bundle(f"{url}/b.zip")

    (folder / "b.zip").write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not a valid zip"):
        download_bundle(f"{url}/b.zip")

    with zipfile.ZipFile(folder / "b.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(BUNDLE / FACTS, "facts.jsonl")
    with pytest.raises(UserError, match=r"no core\.yaml"):
        download_bundle(f"{url}/b.zip")

    data = bytearray((folder / "b.zip").read_bytes())
    data[200] ^= 0xFF  # inside the compressed text
    (folder / "b.zip").write_bytes(data)
    with pytest.raises(UserError, match="not a valid zip"):
        download_bundle(f"{url}/b.zip")
    assert not target.exists()
    assert list(target.parent.iterdir()) == []

    target.mkdir()
    with pytest.raises(UserError, match=r"has no core\.yaml: move it away"):
        download_bundle(f"{url}/b.zip")


# ---------------------------------------------------------------------------------------------------------
# The script


def test_script(bundle, monkeypatch, capsys):
    model = HashModel(3)
    meta = {"model_tag": "d4", "step": 1200}
    monkeypatch.setattr(base_eval, "load_model", lambda *args: (model, WordTokenizer(), meta))
    base_eval.main(base_eval.Config(device_type="cpu", dtype="fp32"))
    core = evaluate_core(model, WordTokenizer(), "cpu")
    out = capsys.readouterr().out
    assert f"{core['core_metric']:.4f}" in out
    assert "tiny_sequences" in out
    rows = list(csv.reader((bundle.parent / "base_eval" / "d4_001200.csv").read_text().splitlines()))
    assert rows[0] == ["Task", "Accuracy", "Centered"]
    assert rows[-1] == ["CORE", "", f"{core['core_metric']:.6f}"]
    assert float(rows[1][1]) == pytest.approx(core["results"]["tiny_facts"], abs=1e-6)
    logged = json.loads((bundle.parent / "report" / "base-model-evaluation.json").read_text())["data"]
    assert logged == {
        "Model": "d4 (step 1,200)",
        "CORE metric": core["core_metric"],
        **core["centered_results"],
    }


def test_script_fetches_the_bundle(server, bundle, monkeypatch, capsys):
    folder, url = server
    shutil.make_archive(str(folder / "b"), "zip", bundle.parent, bundle.name)
    shutil.rmtree(bundle)
    monkeypatch.setattr(base_eval, "download_bundle", lambda: download_bundle(f"{url}/b.zip"))
    test_script(bundle, monkeypatch, capsys)


def test_script_without_bundle(bundle, tmp_path, monkeypatch, capsys):
    shutil.rmtree(bundle)
    with pytest.raises(UserError, match="model_tag"):  # known before anything is downloaded
        base_eval.main(base_eval.Config(device_type="cpu", model_tag="../d4"))
    monkeypatch.setattr(base_eval, "load_model", lambda *args: (None, None, {"model_tag": "d4", "step": 1200}))
    base_eval.main(base_eval.Config(device_type="cpu"))
    out = capsys.readouterr().out
    assert "CORE: not run, could not download" in out
    assert core_bundle.BUNDLE_URL in out
    assert "CORE: not run" in (tmp_path / "report" / "base-model-evaluation.md").read_text()


def test_script_without_transformers(bundle, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match="uv sync --extra frozen"):
        base_eval.main(base_eval.Config(hf_path="some/model", device_type="cpu"))


@pytest.mark.filterwarnings("ignore")  # another project's code
def test_hugging_face_model(bundle, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    text = " ".join(line for path in bundle.rglob("*.jsonl") for line in path.read_text().splitlines())
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], vocab_size=400, special_tokens=["<|endoftext|>"])
    folder = tmp_path / "tiny gpt2"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=400, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)

    model, tokenizer, _ = pretrained.from_transformers(str(folder), torch.float32)
    model, tokenizer = base_eval.HFModel(model), pretrained.PretrainedTokenizer(tokenizer)
    assert model.max_seq_len == 64
    assert tokenizer.get_bos_token_id() == 0
    assert tokenizer.encode(["legs"], prepend=0)[0][1:] == fast("legs")["input_ids"]
    assert model(torch.zeros(2, 5, dtype=torch.long)).shape == (2, 5, 400)

    base_eval.main(base_eval.Config(hf_path=str(folder), device_type="cpu", dtype="fp32", max_per_task=4))
    (path,) = (bundle.parent / "base_eval").glob("*tiny-gpt2.csv")
    assert len(path.read_text().splitlines()) == 5
    # A comparison must not take the place of the base model's own figure
    assert not (bundle.parent / "report" / "base-model-evaluation.md").exists()

    with pytest.raises(UserError, match="cannot load"):
        base_eval.main(base_eval.Config(hf_path=str(tmp_path / "no such model"), device_type="cpu"))


def test_evaluate_task_counts_what_it_does():
    steps = []
    meta = TaskMeta("t", "schema", "", num_fewshot=1)
    data = [{"context_options": ["a b", "c d"], "continuation": "e f", "gold": i % 2} for i in range(6)]
    # Even and odd items ask the same with opposite answers, so whatever the model thinks, half is right
    # when nothing is shown before them.
    zero_shot = TaskMeta("t", "schema", "")
    accuracy = evaluate_task(HashModel(1), WordTokenizer(), data, "cpu", zero_shot, lambda: steps.append(1))
    assert accuracy == 0.5
    assert len(steps) == 6
    assert 0 <= evaluate_task(HashModel(1), WordTokenizer(), data, "cpu", meta) <= 1
