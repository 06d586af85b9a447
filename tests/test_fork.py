"""A cache folder as nanochat's users have it, from its description alone: it trains on, chats and reports."""

import json
import os
import sys
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat import configurator, report
from nanochat.gpt import GPTConfig
from scripts import chat_sft, chat_web, mid_train
from tasks import mixtures
from tests.helpers import TEXT, call_script, make_model

CONFIG = GPTConfig(sequence_len=64, vocab_size=300, n_layer=1, n_head=1, n_kv_head=1, n_embd=64)
FOLDERS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints"}
TRAIN = ["--run=dummy", "--device_batch_size=2", "--num_iterations=2", "--eval_every=-1", "--device_type=cpu"]
PRETRAIN = ["--eval_tokens=256", "--total_batch_size=128", "--max_seq_len=64"]
USERS_META = {  # "user_config" of its stages
    "base": {"run": "dummy", "device_type": "", "depth": 1, "max_seq_len": 64, "num_iterations": -1, "grad_clip": 1.0},
    "mid": {"run": "dummy", "dtype": "bfloat16", "max_seq_len": 64, "device_batch_size": 32, "dry_run": 0},
    "sft": {"run": "dummy", "source": "mid", "dtype": "bfloat16", "device_batch_size": 4, "num_epochs": 1},
}
SECTION = """## Base model training
timestamp: 2025-11-02 10:00:00

- run: dummy
- depth: 1
- Number of parameters: 87,680
- Minimum validation bpb: 1.5000

"""


@pytest.fixture
def cache(base_dir, tokenizer, tmp_path, monkeypatch):
    (base_dir / "base_data").mkdir(parents=True)
    for index in (0, 1, 2):
        rows = pa.table({"text": [f"{text}{i}" for i in range(30) for text in TEXT]})
        pq.write_table(rows, base_dir / "base_data" / f"shard_{index:05d}.parquet", row_group_size=40)
    tokenizer.save(base_dir / "tokenizer")
    (base_dir / "tokenizer" / "bpe.json").unlink()
    torch.save(torch.ones(300, dtype=torch.int32), base_dir / "tokenizer" / "token_bytes.pt")
    model = make_model(CONFIG, seed=3)
    state = {f"_orig_mod.{key}": tensor for key, tensor in model.state_dict().items()}
    for key in ("_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"):
        state[key] = state[key][:300].clone()
    state["_orig_mod.transformer.wte.weight"] = state["_orig_mod.transformer.wte.weight"].bfloat16()
    for stage, name in FOLDERS.items():
        folder = base_dir / name / "d1"
        folder.mkdir(parents=True)
        torch.save(state, folder / "model_000650.pt")
        if stage != "sft":  # which keeps none
            torch.save([{"state": {}, "param_groups": []}] * 2, folder / "optim_000650.pt")
        meta = {"step": 650, "val_bpb": 1.5, "model_config": asdict(CONFIG), "user_config": USERS_META[stage]}
        (folder / "meta_000650.json").write_text(json.dumps(meta))
    messages = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]
    (base_dir / "identity_conversations.jsonl").write_text(json.dumps(messages) + "\n")
    (base_dir / "report").mkdir()
    (base_dir / "report" / "base-model-training.md").write_text(SECTION)
    monkeypatch.chdir(tmp_path)
    for script, names in ((mid_train, ("mid_mixture", "mid_val")), (chat_sft, ("sft_mixture", "sft_val"))):
        for name in names:  # without the datasets of the hub
            monkeypatch.setattr(script, name, lambda which, name=name: getattr(mixtures, name)("local"))
    return base_dir


def weights_of(folder, stage, step):
    return cm.load_checkpoint(folder / FOLDERS[stage] / "d1", step)[0]


def test_it_trains_on(cache, capsys):
    """Midtraining from its base model, finetuning from the result; and pretraining, with what was there moved aside."""
    call_script("mid_train", [*TRAIN, *PRETRAIN])
    assert "650 has no optimizer state to resume from exactly; starting again" in capsys.readouterr().out
    meta = cm.load_meta(cache / FOLDERS["mid"] / "d1", 2)
    assert meta["parent"]["step"] == 650
    call_script("chat_sft", [*TRAIN, "--target_examples_per_step=4", "--eval_metrics_every=-1"])
    assert cm.load_meta(cache / FOLDERS["sft"] / "d1", 2)["parent"]["step"] == 2
    before, after = weights_of(cache, "mid", 2), weights_of(cache, "sft", 2)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    call_script("base_train", [*TRAIN, *PRETRAIN, "--depth=1", "--core_metric_every=-1", "--sample_every=-1"])
    assert cm.find_last_step(cache / FOLDERS["base"] / "d1") == 2
    assert len(list((cache / FOLDERS["base"]).glob("d1.old-*/model_000650.pt"))) == 1


def test_it_is_evaluated_and_chats_in_the_terminal(cache, capsys):
    call_script("base_loss", ["--device_batch_size=2", "--split_tokens=256", "--device_type=cpu"])
    assert "val bpb" in capsys.readouterr().out
    call_script("chat_cli", ["-i", "sft", "-g", "d1", "-s", "650", "-p", "Who are you?", "-t", "0", "-k", "50"])
    assert len(capsys.readouterr().out.strip()) > 10


def test_it_chats_in_the_browser(cache, serve):
    config = configurator.parse(chat_web.Config, ["-n", "1", "-i", "sft", "-t", "0.8", "-k", "50", "-m", "8"])
    engine, served, _ = chat_web.load(config, torch.device("cpu"))
    assert (served.source, served.model_tag, served.step) == ("sft", "d1", 650)
    body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 8, "temperature": 0.0}
    with serve(engine).client.stream("POST", "/chat/completions", json=body) as response:
        lines = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
    assert all(set(line) >= {"token", "gpu"} for line in lines[:-1])
    assert lines[-1]["done"] is True


def test_it_reports(cache, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", "generate"])
    configurator.run(report.main, report.Config)
    text = (cache / "report" / "report.md").read_text("utf-8")
    assert "Number of parameters: 87,680" in text
    assert os.path.exists("report.md")
