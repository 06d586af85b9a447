import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["WANDB_MODE"] = "disabled"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from nanochat.common import atomic_write
from nanochat.tokenizer import BYTES_FILE, RustBPETokenizer, count_token_bytes

TEXT = [
    "def double(x):\n    return x + x\n",
    "for i in range(10):\n    print(i, double(i))\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x, self.y = x, y\n",
    "The quick brown fox jumps over the lazy dog. 3 + 4 = 7, 12 * 12 = 144.\n",
]


@pytest.fixture(scope="session")
def tokenizer():
    return RustBPETokenizer.train_from_iterator(TEXT * 3, 300)


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def write_tokenizer(tokenizer, base_dir):
    tokenizer.save(base_dir / "tokenizer")
    with atomic_write(base_dir / "tokenizer" / BYTES_FILE) as file:
        torch.save(count_token_bytes(tokenizer), file)
