import contextlib
import os
import tempfile

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-")  # the cache of `datasets`

import json
import shutil

import pytest
import torch

from nanochat import checkpoint_manager as cm
from nanochat.dataset import Config as DatasetConfig
from nanochat.dataset import main as dataset_main
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer
from tests.helpers import QUICK_BASE, ROOT, TEXT, WITH_MC, call_script, write_tokenizer


def pytest_sessionfinish():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(TEXT * 3, 300)


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base folder with text, a tokenizer, identity conversations, and a base model d1 of random weights."""
    root = tmp_path_factory.mktemp("stages")
    text = root / "text"
    text.mkdir()
    for path in sorted((ROOT / "nanochat").glob("*.py")):
        lines = path.read_text("utf-8").splitlines(keepends=True)
        for i in range(0, len(lines), 20):
            (text / f"{path.stem}_{i}.py").write_text("".join(lines[i : i + 20]), "utf-8")
    patch = pytest.MonkeyPatch()
    patch.setenv("NANOCHAT_BASE_DIR", str(root / "base"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the process that is killed: sums then have the same order
    dataset_main(DatasetConfig(source=str(text)))
    documents = [path.read_text("utf-8") for path in text.iterdir()]
    tokenizer = RustBPETokenizer.train_from_iterator(iter(sorted(documents)), 600)
    write_tokenizer(tokenizer, root / "base")
    conversation = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am a test."}]
    (root / "base" / "identity_conversations.jsonl").write_text(json.dumps(conversation) + "\n")
    torch.manual_seed(1)
    model = GPT(GPTConfig.from_depth(1, 64, tokenizer.get_vocab_size()))
    model.init_weights()
    config = {"sequence_len": 64, "vocab_size": 600, "n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 64}
    cm.save_checkpoint(root / "base" / "base_checkpoints" / "d1", 7, model.state_dict(), None, {"model_config": config})
    yield root / "base"
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture(scope="module")
def mc_trained(base):
    """The base folder with a base model "mc" beside d1, of six steps with --mc and a checkpoint after three."""
    call_script("base_train", [*QUICK_BASE, *WITH_MC, "--num_iterations=6", "--save_every=3", "--model_tag=mc"])
    return base


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from tests.helpers_browser import browsing

    with browsing(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def open_page(browser):
    from tests.helpers_browser import watched_pages

    with watched_pages(browser) as open_page:
        yield open_page


@pytest.fixture
def serve():
    """serve(engine, …): a running server, stopped at the end of the test."""
    from tests.helpers_server import serving  # here: most tests need no server

    with contextlib.ExitStack() as stack:
        yield lambda *engines, **options: stack.enter_context(serving(*engines, **options))
