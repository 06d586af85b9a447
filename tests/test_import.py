"""Importing a cache folder of nanochat: what it holds is checked, and nothing in it is run."""

import json
import os
import pickle
from dataclasses import asdict

import pytest
import tiktoken
import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.gpt import GPTConfig
from nanochat.tokenizer import RustBPETokenizer, count_token_bytes, get_token_bytes, get_tokenizer
from scripts import import_nanochat
from tests.helpers import make_model, write_tokenizer

CONFIG = GPTConfig(sequence_len=32, vocab_size=300, n_layer=2, n_head=2, n_kv_head=1, n_embd=32)
FOLDERS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}


def in_half():
    """A model whose embeddings are bf16, as on nanochat's GPUs."""
    model = make_model(CONFIG, seed=3).eval()
    model.transformer.wte.to(torch.bfloat16)
    return model


def write_step(folder, step, model, prefix="_orig_mod.", **meta):
    """As nanochat writes it: no padding of the vocabulary, no manifest, the keys of a compiled model."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    for key in ("transformer.wte.weight", "lm_head.weight"):
        state[prefix + key] = state[prefix + key][: CONFIG.vocab_size].clone()
    torch.save(state, folder / f"model_{step:06d}.pt")
    torch.save([{"state": {}}, {"state": {}}], folder / f"optim_{step:06d}.pt")
    data = {"step": step, "val_bpb": 1.5, "model_config": asdict(CONFIG), "user_config": {"depth": 2}, **meta}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(data))


@pytest.fixture
def cache(tmp_path, tokenizer):
    """A folder as nanochat leaves it, two of its stages under tags of their own."""
    root = tmp_path / "nanochat"
    tokenizer.save(root / "tokenizer")
    (root / "tokenizer" / "bpe.json").unlink()  # ours alone
    counts = count_token_bytes(tokenizer)
    counts[200] += 2  # nanochat counted the bytes of what "half a character" decodes to
    torch.save(counts, root / "tokenizer" / "token_bytes.pt")
    model = in_half()
    write_step(root / "base_checkpoints" / "d2", 10, model)
    write_step(root / "base_checkpoints" / "d2", 20, model)
    write_step(root / "mid_checkpoints" / "d2", 5, model)
    write_step(root / "chatsft_checkpoints" / "mine", 3, model, prefix="")
    write_step(root / "chatrl_checkpoints" / "d2", 4, model)
    return root


def run(cache):
    import_nanochat.main(parse(import_nanochat.Config, ["--from", str(cache)]))


def files(folder):
    return {path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_all_stages_come_over(cache, base_dir, tokenizer, capsys):
    before = files(cache)
    run(cache)
    assert "1 byte counts corrected" in capsys.readouterr().out
    assert files(cache) == before
    ids = torch.randint(0, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    expected = in_half()
    expected.transformer.wte.float()
    for source, step, tag in (("base", 20, "d2"), ("mid", 5, "d2"), ("sft", 3, "mine"), ("rl", 4, "d2")):
        folder = base_dir / FOLDERS[source] / tag
        manifest = json.loads((folder / f"manifest_{step:06d}.json").read_text())
        assert set(manifest) == {f"model_{step:06d}.pt"}
        model, loaded, meta = cm.load_model(source, "cpu", model_tag=tag)
        assert (meta["step"], meta["val_bpb"], meta["imported_from"]) == (step, 1.5, "nanochat")
        assert meta["tokenizer"] == tokenizer.checksum()
        assert torch.equal(model(ids), expected(ids))
        stored = cm.load_checkpoint(folder, step)[0]
        assert stored["transformer.wte.weight"].dtype == torch.bfloat16  # as it was
        assert stored["lm_head.weight"].shape == (320, 32)  # padded to a multiple of 64
        assert loaded.encode("def f(x):") == tokenizer.encode("def f(x):")
    assert get_tokenizer().get_vocab_size() == 300
    assert torch.equal(get_token_bytes(), count_token_bytes(tokenizer))


def test_nothing_is_overwritten(cache, base_dir, tokenizer):
    run(cache)
    before = files(base_dir)
    with pytest.raises(UserError, match="base_checkpoints/d2 exists"):
        run(cache)
    assert files(base_dir) == before


def test_another_tokenizer_in_the_way(cache, base_dir):
    other = RustBPETokenizer.train_from_iterator(["other words " * 20], 270)
    write_tokenizer(other, base_dir)
    before = files(base_dir)
    with pytest.raises(UserError, match="holds another tokenizer"):
        run(cache)
    assert files(base_dir) == before


def test_the_same_tokenizer_is_kept(cache, base_dir, tokenizer):
    write_tokenizer(tokenizer, base_dir)
    before = files(base_dir)
    run(cache)
    assert files(base_dir).items() >= before.items()


def test_into_itself_and_from_nowhere(cache, base_dir, monkeypatch):
    with pytest.raises(UserError, match="there is no folder"):
        run(cache / "nothing")
    with pytest.raises(UserError, match="no tokenizer in"):
        run(cache / "base_checkpoints")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(cache))
    with pytest.raises(UserError, match="nothing to import"):
        run(cache)


# ---------------------------------------------------------------------------------------------------------
# Malice and damage: refused before anything is written


class Evil:
    """Pickles to a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def payloads(mark):
    shell = f"touch {mark}"
    code = f"open({str(mark)!r}, 'w').close()"
    state = {"name": "rustbpe", "pat_str": ".", "mergeable_ranks": {}, "special_tokens": {}}
    return {
        "os.system": Evil(os.system, shell),
        "builtins.eval": Evil(eval, code),
        "builtins.exec": Evil(exec, code),
        "getattr": Evil(getattr, Evil(__import__, "os"), "system"),
        "nested": {**state, "name": Evil(os.system, shell)},
        "deep": [{"a": ({"b": [Evil(eval, code)]},)}],
    }


# The same by hand: protocol 0 names any global, also a dotted one that walks into attributes
def raw(module, name, argument):
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize("name", [*payloads("x"), "raw", "dotted", "through tiktoken"])
@pytest.mark.parametrize("where", ["tokenizer", "bytes", "model"])
def test_malicious_pickles_do_not_run(name, where, cache, base_dir, tmp_path):
    mark = tmp_path / "it ran"
    by_hand = {
        "raw": raw("posix", "system", f"touch '{mark}'"),
        "dotted": pickle.PROTO + b"\x04" + b"\x8c\x02os\x8c\x0bpath.os.popen\x93\x8c\x01x\x85R.",
        "through tiktoken": raw("tiktoken.core", "functools.os.system", f"touch '{mark}'"),
    }
    data = by_hand[name] if name in by_hand else pickle.dumps(payloads(mark)[name])
    path = {
        "tokenizer": cache / "tokenizer" / "tokenizer.pkl",
        "bytes": cache / "tokenizer" / "token_bytes.pt",
        "model": cache / "mid_checkpoints" / "d2" / "model_000005.pt",
    }[where]
    path.write_bytes(data)
    with pytest.raises(UserError, match="nothing in it was run|cannot be read as a checkpoint"):
        run(cache)
    assert not mark.exists()
    assert not base_dir.exists() or not files(base_dir)


@pytest.mark.parametrize("name", payloads("x"))
def test_malicious_objects_inside_a_torch_file(name, cache, base_dir, tmp_path):
    mark = tmp_path / "it ran"
    path = cache / "chatrl_checkpoints" / "d2" / "model_000004.pt"
    torch.save({**torch.load(path, weights_only=True), "more": payloads(mark)[name]}, path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        run(cache)
    assert not mark.exists()
    assert not base_dir.exists() or not files(base_dir)


def test_the_payloads_would_have_run(tmp_path):
    """Else the tests above show nothing."""
    for name in set(payloads("x")) - {"getattr"}:  # that one only fetches a function
        mark = tmp_path / name
        pickle.loads(pickle.dumps(payloads(mark)[name]))
        assert mark.exists(), name
    pickle.loads(raw("posix", "system", f"touch '{tmp_path / 'raw'}'"))
    assert (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.pkl", "tokenizer/token_bytes.pt", "mid_checkpoints/d2/model_000005.pt"]
)
@pytest.mark.parametrize("keep", [10, 0.5, -1])
def test_truncated_files(name, keep, cache, base_dir):
    path = cache / name
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=path.name):
        run(cache)
    assert not base_dir.exists() or not files(base_dir)


def test_unfinished_steps_are_passed_over(cache, base_dir):
    folder = cache / "base_checkpoints" / "d2"
    (folder / "meta_000020.json").write_text('{"step": 2')
    (cache / "mid_checkpoints" / "d2" / "meta_000005.json").unlink()
    run(cache)
    assert cm.find_last_step(base_dir / "base_checkpoints" / "d2") == 10
    assert not (base_dir / "mid_checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mergeable_ranks": lambda r: {**r, b"\x00": r[b"\x01"]}}, "not numbered from 0"),
        ({"mergeable_ranks": lambda r: {k: v for k, v in r.items() if k != b"a"}}, "not numbered from 0"),
        ({"mergeable_ranks": lambda r: {**r, b"zzzz": 10**6}}, "not numbered from 0"),
        ({"mergeable_ranks": lambda r: {**r, "text": 1}}, "unexpected types"),
        ({"pat_str": lambda p: "((("}, "split pattern"),
        ({"special_tokens": lambda s: {f"<|x{i}|>": n for i, n in enumerate(s.values())}}, r"lacks <\|bos\|>"),
    ],
)
def test_encodings_that_are_none(changes, message, cache, base_dir, tokenizer, monkeypatch):
    enc = tokenizer.enc
    state = {
        "name": "rustbpe",
        "pat_str": enc._pat_str,
        "mergeable_ranks": enc._mergeable_ranks,
        "special_tokens": enc._special_tokens,
    }
    state |= {key: change(state[key]) for key, change in changes.items()}
    monkeypatch.setattr(tiktoken.Encoding, "__getstate__", lambda self: state, raising=False)
    (cache / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(enc))
    with pytest.raises(UserError, match=message):
        run(cache)
    assert not base_dir.exists() or not files(base_dir)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 301}, "weights do not fit"),
        ({"n_layer": 3}, "weights do not fit"),
        ({"n_embd": 64}, "weights do not fit"),
        ({"n_kv_head": 2}, "weights do not fit"),
        ({"n_head": 3}, "model_config makes no model"),
        ({"n_layer": 10**9}, "whole numbers from 1 to 1,048,576"),
        ({"n_layer": 10**6}, "weights of 1,000,000 layers"),
        ({"sequence_len": 10**12}, "whole numbers from 1 to 1,048,576"),
        ({"n_embd": "32"}, "whole numbers from 1 to 1,048,576"),
        ({"n_embd": 0}, "whole numbers from 1 to 1,048,576"),
        ({"window_pattern": "SSSL"}, "a newer nanochat wrote it"),
    ],
)
def test_wrong_shapes_and_vocabularies(config, message, cache, base_dir):
    write_step(cache / "mid_checkpoints" / "d2", 5, in_half(), model_config={**asdict(CONFIG), **config})
    with pytest.raises(UserError, match=message):
        run(cache)
    assert not base_dir.exists() or not files(base_dir)


def test_checkpoints_of_another_tokenizer(cache, base_dir):
    other = RustBPETokenizer.train_from_iterator(["other words " * 20], 270)
    write_tokenizer(other, cache)
    with pytest.raises(UserError, match="was trained with 300 tokens, the tokenizer has"):
        run(cache)
    assert not base_dir.exists() or not files(base_dir)


def test_bytes_of_another_tokenizer(cache, base_dir):
    for content in (torch.zeros(299, dtype=torch.int32), {"a": 1}):
        torch.save(content, cache / "tokenizer" / "token_bytes.pt")
        with pytest.raises(UserError, match="expected a tensor of 300 numbers"):
            run(cache)
    assert not base_dir.exists() or not files(base_dir)


def test_not_a_state_dict(cache, base_dir):
    torch.save([1, 2], cache / "mid_checkpoints" / "d2" / "model_000005.pt")
    with pytest.raises(UserError, match="not a state dict"):
        run(cache)
