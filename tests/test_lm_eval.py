"""The adapter for lm-evaluation-harness against slow references, and the harness itself on tasks of our own."""

import json
import math
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from megacontext.config import MCConfig
from megacontext.inference import SessionScorer, session_maker
from megacontext.networks import MCNetworks
from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.lm_eval_adapter import HarnessLM
from scripts import lm_eval as script
from scripts.export_hf import export_hf
from tests.helpers import likeliest, make_model, write_tokenizer
from tests.helpers_server import MODEL, serving

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

T = 32
CONFIG = GPTConfig(sequence_len=T, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
LONG = "for i in range(10):\n    print(i, double(i))\n" * 4
PAIRS = [
    ("def double(x):\n", "    return x + x\n"),
    ("", "The quick brown fox"),
    ("3 + 4 =", " 7"),
    ("ends with spaces  ", "and goes on"),
    (LONG, " print"),
    (LONG[:40], LONG[40:55]),
    ("x", "y"),
]


NATS = 1e-3  # float32: sums of up to 33 log-probabilities of up to 15 nats, each off by several ε, in any order


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def adapter(tokenizer):
    return lambda batch_size=4: HarnessLM(make_model(CONFIG, spread=0.5).eval(), tokenizer, batch_size=batch_size)


def reference(model, ids, n):
    """(log-likelihood, greedy) of the last n of at most T + 1 ids: one at a time, each from all before it."""
    total, greedy = 0.0, True
    for end in range(len(ids) - n, len(ids)):
        logits = model(torch.tensor([ids[:end]]))[0, -1]
        total += F.log_softmax(logits.double(), dim=-1)[ids[end]].item()
        greedy &= logits.argmax().item() == ids[end]
    return total, greedy


def split(tokenizer, context, continuation):
    """
    Ids of both and how many are the continuation's, by the harness's rules: spaces between them belong to it, and
    it has as many tokens as it adds to the context's (where a token spans both, the context's own are kept).
    """
    spaces = context[len(context.rstrip()) :]
    before = tokenizer.encode(context.rstrip(), prepend="<|bos|>")
    whole = tokenizer.encode(context.rstrip() + spaces + continuation, prepend="<|bos|>")
    return before + whole[len(before) :], len(whole) - len(before)


@torch.no_grad()
def test_loglikelihood(adapter, tokenizer):
    lm = adapter()
    assert max(len(split(tokenizer, *pair)[0]) for pair in PAIRS) > 2 * T  # some lose their beginning
    answers = lm.loglikelihood([Request(*pair) for pair in PAIRS], disable_tqdm=True)
    for pair, (score, greedy) in zip(PAIRS, answers, strict=True):
        ids, n = split(tokenizer, *pair)
        # The harness cuts on the left, so that T tokens go in
        expected = reference(lm.model, ids[-(T + 1) :], n)
        assert score == pytest.approx(expected[0], abs=NATS)
        assert greedy == expected[1]
        assert score < 0


@torch.no_grad()
def test_greedy_is_recognised(adapter, tokenizer):
    """Continuations that the model itself says are greedy, others not."""
    lm = adapter()
    request = (("", ""), tokenizer.encode("The", prepend="<|bos|>"), [])
    said = []
    for _ in range(6):
        said.append(lm.model(torch.tensor([request[1] + said]))[0, -1].argmax().item())
    other = [*said[:-1], (said[-1] + 1) % 300]
    answers = lm._loglikelihood_tokens([(None, request[1], said), (None, request[1], other)], disable_tqdm=True)
    assert [greedy for _, greedy in answers] == [True, False]
    assert answers[0][0] > answers[1][0]


def test_batches_and_padding_change_nothing(adapter):
    requests = [Request(*pair) for pair in PAIRS]
    alone = adapter(1).loglikelihood(requests, disable_tqdm=True)
    for batch_size in (2, 3, 50):
        together = adapter(batch_size).loglikelihood(requests, disable_tqdm=True)
        assert [g for _, g in together] == [g for _, g in alone]
        assert [s for s, _ in together] == pytest.approx([s for s, _ in alone], abs=NATS)
    shuffled = adapter(3).loglikelihood(requests[::-1], disable_tqdm=True)[::-1]
    assert [s for s, _ in shuffled] == pytest.approx([s for s, _ in alone], abs=NATS)


@torch.no_grad()
def test_in_sessions_nothing_is_cut(adapter, tokenizer):
    """With room for all tokens at full detail, contexts far beyond T are read as by the model; with less, they fit."""
    model = adapter().model
    config = MCConfig(block_size=4, allocator_soft_max=300, allocator_recent_tokens=8, mc_infer_refocus_interval=8)
    networks = MCNetworks(model.config.n_embd, model.config.n_layer, config.resolve(T)).eval()
    lm = HarnessLM(model, tokenizer, sessions=SessionScorer(session_maker(model, networks, config.resolve(T))))
    pairs = [pair for pair in PAIRS if pair[0]]
    answers = lm.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for pair, (score, greedy) in zip(pairs, answers, strict=True):
        expected = reference(model, *split(tokenizer, *pair))
        assert score == pytest.approx(expected[0], abs=NATS)
        assert greedy == expected[1]
    ids = tokenizer.encode(LONG, prepend="<|bos|>")
    assert len(ids) > 3 * T
    [rolled] = lm.loglikelihood_rolling([Request(LONG)], disable_tqdm=True)
    assert rolled == pytest.approx(reference(model, ids, len(ids) - 1)[0], abs=NATS)
    greedy = {"max_gen_toks": 8, "do_sample": False, "until": []}
    [text] = lm.generate_until([Request(LONG, greedy)], disable_tqdm=True)
    assert text == tokenizer.decode([id for id in likeliest(model, ids, 8) if id not in lm.bpe.special_ids])

    prefills = []
    make = session_maker(model, networks, config.resolve(T))
    lm.sessions = SessionScorer(lambda: prefills.append(1) or make())
    choices = [Request(LONG, " print"), Request("x", "y"), Request(LONG, " for i"), Request("x", "yy")]
    assert lm.loglikelihood(choices, disable_tqdm=True)[0] == answers[pairs.index((LONG, " print"))]
    assert len(prefills) == 2  # each context is read once

    lm.sessions = SessionScorer(session_maker(model, networks, replace(config, allocator_soft_max=40).resolve(T)))
    [(compressed, _)] = lm.loglikelihood([Request(LONG, " print")], disable_tqdm=True)
    assert compressed != pytest.approx(answers[pairs.index((LONG, " print"))][0], abs=NATS)


@torch.no_grad()
def test_rolling(adapter, tokenizer):
    """Each token once; the first T after <|bos|>, later windows full and scored at their end alone."""
    lm = adapter()
    texts = ["", "Hi", LONG, LONG[:70]]
    answers = lm.loglikelihood_rolling([Request(text) for text in texts], disable_tqdm=True)
    for text, answer in zip(texts, answers, strict=True):
        ids = tokenizer.encode(text)
        expected = reference(lm.model, [tokenizer.get_bos_token_id(), *ids[:T]], len(ids[:T]))[0] if ids else 0.0
        for start in range(T, len(ids), T):
            end = min(start + T, len(ids))
            expected += reference(lm.model, ids[end - T - 1 : end], end - start)[0]
        assert answer == pytest.approx(expected, abs=NATS)


def test_generate_until(adapter, tokenizer):
    lm = adapter()
    greedy = {"max_gen_toks": 12, "do_sample": False, "until": []}
    prompts = ["def double", LONG]
    texts = lm.generate_until([Request(prompt, greedy) for prompt in prompts], disable_tqdm=True)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer.encode(prompt, prepend="<|bos|>")[-(T - 12) :]
        said, ends = [], {tokenizer.encode_special(t) for t in ("<|bos|>", "<|assistant_end|>")}
        for token in likeliest(lm.model, ids, 12):
            if token in ends:
                break
            said.append(token)
        assert text == tokenizer.decode([token for token in said if token not in lm.bpe.special_ids])
        assert text
    whole = lm.generate_until([Request("def double", greedy)], disable_tqdm=True)[0]
    for stop in (whole[3], whole[2:5], whole[-1]):
        cut = lm.generate_until([Request("def double", {**greedy, "until": ["never", stop]})], disable_tqdm=True)[0]
        assert cut == whole[: whole.index(stop)]
    sampled = {"max_gen_toks": 12, "do_sample": True, "temperature": 5.0, "until": []}
    assert lm.generate_until([Request("def double", sampled)], disable_tqdm=True)[0] != whole


def test_what_does_not_fit(adapter, tokenizer):
    lm = adapter()
    with pytest.raises(UserError, match="wants 32 new tokens, the model's context has 32"):
        lm.generate_until([Request("x", {"max_gen_toks": 32, "until": []})], disable_tqdm=True)
    with pytest.raises(UserError, match="longer than the model's context of 32"):
        lm.loglikelihood([Request("x", LONG)], disable_tqdm=True)


def test_chat_format(adapter, tokenizer):
    lm = adapter()
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    ids = lm.tok_encode(lm.apply_chat_template(chat))
    assert ids == tokenizer.render_for_completion({"messages": chat})
    closed = lm.tok_encode(lm.apply_chat_template(chat[:3], add_generation_prompt=False))
    assert closed == tokenizer.render_conversation({"messages": chat[:3]})[0]
    hidden = lm.tok_encode("text with <|assistant_end|> in it")
    assert tokenizer.encode_special("<|assistant_end|>") not in hidden


@pytest.mark.parametrize("batch_size", [1, 3])
def test_over_http(adapter, tokenizer, tmp_path, batch_size):
    """The harness' own client of /v1/completions gets from our server what its adapter gets from the model."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    lm = adapter()
    export_hf(tmp_path / "exported", lm.model, tokenizer)
    with serving(Engine(lm.model, tokenizer)) as server:
        options = {
            "model": MODEL.id,
            "tokenizer": str(tmp_path / "exported"),
            "max_length": T,
            "batch_size": batch_size,
        }
        connect = partial(LocalCompletionsAPI, base_url=f"{server.url}/v1/completions", **options)
        remote = connect(add_bos_token=True)
        requests = [Request(*pair) for pair in PAIRS if len(split(tokenizer, *pair)[0]) < T]
        assert len(requests) >= 5
        ours, theirs = (m.loglikelihood(requests, disable_tqdm=True) for m in (lm, remote))
        assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
        assert [score for score, _ in theirs] == pytest.approx([score for score, _ in ours], abs=1e-4)
        # Here it has a prefix of its own
        remote = connect(custom_prefix_token_id=tokenizer.get_bos_token_id())
        texts = [Request(text) for text in ("Hi", "def double(x):")]
        ours, theirs = (m.loglikelihood_rolling(texts, disable_tqdm=True) for m in (lm, remote))
        assert theirs == pytest.approx(ours, abs=1e-3)
        remote = connect(add_bos_token=True)
        prompts = [Request(text, {"max_gen_toks": 8, "do_sample": False, "until": ["\n"]}) for text in ("The", "3 +")]
        ours, theirs = (m.generate_until(prompts, disable_tqdm=True) for m in (lm, remote))
        assert theirs == ours


# ---------------------------------------------------------------------------------------------------------
# The harness

CHOICE = """task: mine_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
TEXTS = """task: mine_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{q}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
SAID = """task: mine_said
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{said}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_the_harness_on_tasks_of_ours(adapter, tokenizer, base_dir, tmp_path, monkeypatch, capsys):
    """Multiple choice, text and generation from YAML files over a jsonl; every figure computed here by hand too."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    write_tokenizer(tokenizer, base_dir)
    model, lm = make_model(CONFIG, spread=0.5).eval(), adapter()
    meta = {"step": 5, "model_config": asdict(model.config)}
    cm.save_checkpoint(base_dir / "base_checkpoints" / "d2", 5, model.state_dict(), None, meta)
    questions = ["for i in range(10):", "The quick", "class", "def double(x):", "3 +"]
    choices = [" print(i)", " brown fox", " Point:"]
    docs = []
    for i, question in enumerate(questions):
        said = lm.generate_until([Request(question, {"max_gen_toks": 8, "until": ["\n"]})], disable_tqdm=True)[0]
        docs.append({"q": question, "choices": choices, "gold": i % 3, "said": said if i % 2 == 0 else f"not {said}"})
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in (("choice", CHOICE), ("text", TEXTS), ("said", SAID)):
        (tasks / f"{name}.yaml").write_text(text.format(file=tmp_path / "docs.jsonl"))
    options = ["-i", "base", f"--include_path={tasks}", "--device_type=cpu", "--dtype=fp32"]
    script.main(parse(script.Config, [*options, "--tasks=mine_choice,mine_text,mine_said", "--batch_size=3"]))

    results = json.loads((base_dir / "lm_eval" / "base_d2_000005.json").read_text())["results"]
    right, nats = 0, 0.0
    with torch.no_grad():
        for doc in docs:
            scores = []
            for choice in choices:
                ids, n = split(tokenizer, doc["q"], f" {choice}")  # the harness puts a space between the two
                scores.append(reference(model, ids, n)[0])
            right += max(range(3), key=scores.__getitem__) == doc["gold"]
            ids = tokenizer.encode(doc["q"], prepend="<|bos|>")
            nats -= reference(model, ids, len(ids) - 1)[0]
    size = sum(len(doc["q"].encode()) for doc in docs)
    assert results["mine_choice"]["acc,none"] == pytest.approx(right / 5)
    assert results["mine_text"]["bits_per_byte,none"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert results["mine_said"]["exact_match,none"] == pytest.approx(3 / 5)
    out = capsys.readouterr().out
    assert "mine_choice" in out
    assert "mine_text, bits_per_byte" in (base_dir / "report" / "harness-evaluation-base.md").read_text()
    with pytest.raises(UserError, match="no task hellaswag"):
        script.main(parse(script.Config, [*options, "--tasks=mine_choice,hellaswag"]))
