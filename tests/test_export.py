"""The export for transformers: the same logits, text, ids and chat format in both."""

import json
import random
import re
from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.engine import Engine
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer
from scripts import export_hf as script
from scripts.export_hf import export_hf, to_hf_tokenizer
from tests.helpers import ROOT, TEXT, make_model, write_tokenizer

CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 17 + 25?\nThink “twice”."},
    {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Let me see: "},
            {"type": "python", "text": "17+25"},
            {"type": "python_output", "text": "42"},
            {"type": "text", "text": "42."},
        ],
    },
    {"role": "user", "content": "  And 12*12? "},
    {"role": "assistant", "content": "144"},
    {"role": "user", "content": "Danke schön 🙂"},
]


def large(n_kv_head=2):
    """Weights as large as after training. The vocabulary, 300, is padded to 320."""
    config = GPTConfig(sequence_len=64, vocab_size=300, n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=64)
    return make_model(config, spread=0.5).eval()


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    model = large()
    export_hf(folder, model, tokenizer)
    return folder, model


@pytest.fixture(scope="module")
def theirs(exported):
    folder, _ = exported
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def test_equal_logits(exported, theirs, tmp_path, tokenizer):
    for n_kv_head in (1, 2, 4):
        model, hf = (exported[1], theirs[0]) if n_kv_head == 2 else (large(n_kv_head), None)
        if hf is None:
            export_hf(tmp_path / str(n_kv_head), model, tokenizer)
            hf = AutoModelForCausalLM.from_pretrained(tmp_path / str(n_kv_head)).eval()
        ids = torch.randint(0, 300, (3, 64), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ours, other = model(ids), hf(ids).logits
        assert type(hf).__name__ == "NanoChatForCausalLM"
        assert other.shape == (3, 64, 300)
        assert ours.std() > 3  # the softcap at 15 is felt
        torch.testing.assert_close(other, ours, atol=2e-4, rtol=0)


def test_same_greedy_text(exported, theirs, tokenizer):
    _, model = exported
    hf, hf_tokenizer = theirs
    engine = Engine(model, tokenizer)
    lengths = set()
    for question in ("Hello", "for i in range", "What is 3 + 4?", "x", "The quick brown fox"):
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.render_for_completion({"messages": chat})
        rows, _ = engine.generate_batch(prompt, max_tokens=40, temperature=0.0, keep_end=True)
        inputs = hf_tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = hf.generate(**inputs, max_new_tokens=40)[0].tolist()
        assert output == rows[0]
        assert hf_tokenizer.decode(output) == tokenizer.decode(rows[0])
        lengths.add(len(output) - len(prompt))
    assert max(lengths) > 10


def test_padded_rows_are_as_if_alone(exported, theirs):
    """Left padding with the token that the export names, and an attention mask: the same text for each row."""
    hf, hf_tokenizer = theirs
    prompts = ["def double(x):", "x", "3 + 4 ="]
    batch = hf_tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    width = batch["input_ids"].size(1)
    assert batch["input_ids"][1, 0] == hf_tokenizer.convert_tokens_to_ids("<|assistant_end|>")
    for row, prompt in zip(hf.generate(**batch, max_new_tokens=8), prompts, strict=True):
        inputs = hf_tokenizer(prompt, return_tensors="pt")
        alone = hf.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].size(1) :]
        assert row[width : width + len(alone)].tolist() == alone.tolist()


# ---------------------------------------------------------------------------------------------------------
# Tokenizer


@given(st.text(max_size=60) | st.text(alphabet="abx 0123456789'\n\r\t(){}sdé", max_size=80))
@settings(max_examples=300, deadline=None)
def test_same_ids(theirs, tokenizer, text):
    _, hf_tokenizer = theirs
    ids = tokenizer.encode(text)
    spelled_out = any(token in text for token in SPECIAL_TOKENS)
    assert hf_tokenizer(text, add_special_tokens=False)["input_ids"] == ids or spelled_out
    assert hf_tokenizer.decode(ids) == text.encode("utf-8", "replace").decode("utf-8")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_same_ids_for_any_merges(data):
    """Also where a token can be made in several ways, or in none: ranks that no training would give."""
    alphabet = [b"a", b"b", b"c"]
    parts = st.lists(st.sampled_from(alphabet), min_size=2, max_size=5).map(b"".join)
    tokens = data.draw(st.lists(parts, unique=True, max_size=12))
    ranks = {token: i for i, token in enumerate([bytes([i]) for i in range(256)] + tokens)}
    ours = RustBPETokenizer.from_ranks(r"\p{L}+|[^\p{L}]+", ranks)
    theirs = to_hf_tokenizer(ours)
    text = data.draw(st.text(alphabet="abc", max_size=12))
    expected = ours.encode(text)
    got = theirs.encode(text, add_special_tokens=False).ids
    assert [ours.id_to_bytes(i) for i in got] == [ours.id_to_bytes(i) for i in expected]


def test_digits_are_cut_in_twos_and_specials_keep_their_ids(exported, theirs, tokenizer):
    _, hf_tokenizer = theirs
    assert r"\p{N}{1,2}" in json.dumps((exported[0] / "tokenizer.json").read_text()).replace("\\\\", "\\")
    state = Tokenizer.from_file(str(exported[0] / "tokenizer.json"))
    pieces = state.pre_tokenizer.pre_tokenize_str("1234567 x")
    assert [piece for piece, _ in pieces] == ["12", "34", "56", "7", "Ġx"]
    assert len(hf_tokenizer) == tokenizer.get_vocab_size()
    for token in SPECIAL_TOKENS:
        ids = hf_tokenizer(token, add_special_tokens=False)["input_ids"]
        assert ids == [tokenizer.encode_special(token)]
        assert hf_tokenizer.decode(ids) == token
        assert hf_tokenizer.decode(ids, skip_special_tokens=True) == ""
    assert hf_tokenizer("a")["input_ids"] == tokenizer.encode("a", prepend="<|bos|>")
    hidden = "not <|assistant_end|> special"  # told so, it stays text, as with us
    plain = hf_tokenizer(hidden, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert plain == tokenizer.encode(hidden)


# ---------------------------------------------------------------------------------------------------------
# Chat format


def test_chat_template_is_our_format(theirs, tokenizer):
    _, hf_tokenizer = theirs
    for length in (2, 4, 6):
        messages = CHAT[:length]
        ids = hf_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == tokenizer.render_for_completion({"messages": messages})
    for start, end in ((1, 2), (1, 3), (0, 5), (1, 6)):
        ids = hf_tokenizer.apply_chat_template(CHAT[start:end])["input_ids"]
        assert ids == tokenizer.render_conversation({"messages": CHAT[start:end]})[0]


def test_chat_template_marks_what_the_assistant_produces(theirs, tokenizer):
    _, hf_tokenizer = theirs
    out = hf_tokenizer.apply_chat_template(CHAT[:5], return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = tokenizer.render_conversation({"messages": CHAT[:5]})
    assert out["input_ids"] == ids
    assert out["assistant_masks"] == mask


@pytest.mark.parametrize(
    "messages",
    [CHAT[:1], [CHAT[4]], [CHAT[1], CHAT[3]], [CHAT[1], {"role": "assistant", "content": [{"type": "image"}]}]],
)
def test_chat_template_refuses_what_we_refuse(theirs, tokenizer, messages):
    with pytest.raises(ValueError, match=r"."):
        tokenizer.render_conversation({"messages": messages})
    with pytest.raises(Exception, match="expected|unknown part"):
        theirs[1].apply_chat_template(messages)


# ---------------------------------------------------------------------------------------------------------
# The folder


def test_files_and_precision(exported, tokenizer, tmp_path):
    folder, model = exported
    names = {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    export_hf(tmp_path / "half", model, tokenizer, torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_the_documented_program_runs(tmp_path, tokenizer, monkeypatch, capsys):
    export_hf(tmp_path / "my_model", large(), tokenizer)
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "obsidian/ops/Base Runtime.md").read_text("utf-8")
    (program,) = re.findall(r"```python\n(from transformers.*?)```", page, re.DOTALL)
    exec(program, {})
    assert capsys.readouterr().out.startswith("<|bos|><|user_start|>What")


def test_large_weights_come_in_shards(tmp_path, tokenizer, monkeypatch):
    save = script.save_torch_state_dict
    monkeypatch.setattr(script, "save_torch_state_dict", lambda *a, **k: save(*a, **{**k, "max_shard_size": 50_000}))
    model = large()
    export_hf(tmp_path / "model", model, tokenizer)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(ids).logits, model(ids), atol=2e-4, rtol=0)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, tokenizer, monkeypatch):
    model, target = large(), tmp_path / "model"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="model exists: choose another --output"):
        export_hf(target, model, tokenizer)
    assert (target / "thesis.txt").read_text() == "mine"
    (target / "thesis.txt").unlink()
    with monkeypatch.context() as patch:

        def full(*_args, **_kwargs):
            raise OSError(28, "No space left on device")

        patch.setattr(script, "to_hf_tokenizer", full)  # the weights are written by then
        with pytest.raises(UserError, match="No space left"):
            export_hf(target, model, tokenizer)
    assert list(target.iterdir()) == []
    export_hf(target, model, tokenizer)  # an empty folder may be filled
    assert (target / "model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command(base_dir, tmp_path, tokenizer, capsys):
    write_tokenizer(tokenizer, base_dir)
    model = large()
    for step, more in ((3, {}), (9, {"megacontext": {"block_size": 4}})):
        meta = {"step": step, "model_config": asdict(model.config), **more}
        cm.save_checkpoint(base_dir / "chatsft_checkpoints" / "d2", step, model.state_dict(), None, meta)
    for step, folder in ((3, "three"), (-1, "newest")):
        script.main(
            parse(script.Config, ["-i", "sft", "-g", "d2", "-s", str(step), "--output", str(tmp_path / folder)])
        )
        out = capsys.readouterr().out
        assert ("MegaContext's networks" in out) == (step == -1)
        assert re.search(f"step {9 if step == -1 else 3}, written to", out)
        ids = torch.tensor([random.Random(0).choices(range(300), k=20)])
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(loaded(ids).logits, model(ids), atol=2e-4, rtol=0)


def test_the_text_of_the_tests_is_encoded_alike(theirs, tokenizer):
    for text in TEXT:
        assert theirs[1](text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
