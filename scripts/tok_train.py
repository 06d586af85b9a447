"""
Train the tokenizer on the training shards, and save the number of bytes of each token.

    python -m scripts.tok_train --max_chars=2000000000
"""

import time
from dataclasses import asdict, dataclass
from itertools import chain

import torch
from rich.console import Console
from rich.progress import Progress

from nanochat.common import UserError, atomic_write, get_base_dir
from nanochat.configurator import run
from nanochat.dataset import iter_documents
from nanochat.ranges import Count
from nanochat.report import get_report
from nanochat.sources import first
from nanochat.tokenizer import BYTES_FILE, RustBPETokenizer, count_token_bytes

CHECK_TEXT = """Hello, world! 12345 + 6789 = 19134.
    Tabs\tand spaces,   contractions like I'm, you'll, they've;
Unicode: 你好 🌍 café naïve — "quotes" <|bos|> is ordinary text here."""


@dataclass
class Config:
    max_chars: Count = 10_000_000_000
    """characters of training text, at most"""
    doc_cap: Count = 10_000
    """characters per document, at most"""
    vocab_size: Count = 65536
    """size of the vocabulary: bytes, merges and special tokens"""


def main(config: Config):
    started = time.time()
    with Progress(console=Console(stderr=True)) as bar:
        tasks = {}

        def progress(stage, done, total):
            task = tasks.setdefault(stage, None) or bar.add_task(stage, total=None)
            tasks[stage] = task
            bar.update(task, completed=done, total=total or None)

        texts = (text[: config.doc_cap] for text in chain.from_iterable(iter_documents("train")))
        texts = first(config.max_chars, texts)
        tokenizer = RustBPETokenizer.train_from_iterator(texts, config.vocab_size, progress)
    seconds = time.time() - started
    if tokenizer.get_vocab_size() != config.vocab_size:
        raise UserError(
            f"the text has too few different pairs for {config.vocab_size:,} tokens, got "
            f"{tokenizer.get_vocab_size():,}: lower --vocab_size or use more text"
        )
    if tokenizer.decode(tokenizer.encode(CHECK_TEXT)) != CHECK_TEXT:
        raise AssertionError("the new tokenizer does not give back the text that it encoded")

    folder = get_base_dir() / "tokenizer"
    counts = count_token_bytes(tokenizer)
    with atomic_write(folder / BYTES_FILE) as file:
        torch.save(counts, file)
    tokenizer.save(folder)  # written last, so that an existing tokenizer is complete
    print(f"{config.vocab_size:,} tokens learned in {seconds:.1f} s; written to {folder}")

    sizes = counts[counts > 0].float()
    facts = {
        "Training time (s)": seconds,
        "Special tokens": int((counts == 0).sum()),
        "Bytes per token, mean": sizes.mean().item(),
        "Bytes per token, standard deviation": sizes.std().item(),
        "Bytes per token, longest": int(sizes.max()),
    }
    get_report().log(section="Tokenizer training", data=[facts, asdict(config)])


if __name__ == "__main__":
    run(main, Config)
