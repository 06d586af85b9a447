"""
Check a cache folder of nanochat and copy it into ours. No code in its files is run.

nanochat writes tokenizer/tokenizer.pkl and token_bytes.pt, and for each stage <stage>_checkpoints/<tag>/ with
model_%06d.pt (its keys may begin with `_orig_mod.`) and meta_%06d.json, without checksums. Optimizer states are not
imported: nanochat saves those of one rank only, with which no stage could be resumed exactly.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError, atomic_write
from nanochat.tokenizer import BPE_FILE, BYTES_FILE, PICKLE_FILE, SPECIAL_TOKENS, RustBPETokenizer, count_token_bytes

MAX_SEQUENCE_LEN = 2**20  # the table of rotary angles is ten times as long


@dataclass
class Found:
    """A checkpoint in a nanochat folder."""

    source: str  # "base", "mid", "sft" or "rl"
    tag: str
    step: int
    folder: Path

    def __str__(self):
        return f"{self.source} {self.tag}, step {self.step:,}"


def find_checkpoints(root) -> list[Found]:
    """The newest complete step of each model of each stage."""
    found = []
    for source, name in cm.SOURCES.items():
        for folder in sorted(path for path in (Path(root) / name).glob("*") if path.is_dir()):
            step = cm.find_last_step(folder)
            if step is not None:
                found.append(Found(source, folder.name, step, folder))
    return found


def read_tokenizer(folder) -> tuple[RustBPETokenizer, int]:
    """
    (tokenizer, number of wrong entries in its token_bytes.pt) of a nanochat tokenizer folder.

    nanochat counted the bytes of decoded text, which is wrong for tokens that are parts of characters.
    Raises UserError if the files are invalid or do not belong together.
    """
    folder = Path(folder)
    tokenizer = RustBPETokenizer.from_directory(folder)
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_special_tokens()]
    if missing:
        raise UserError(f"the tokenizer in {folder} lacks {', '.join(missing)}: it is not one of nanochat's")
    V, counts = tokenizer.get_vocab_size(), count_token_bytes(tokenizer)
    path = folder / BYTES_FILE
    if not path.exists():
        return tokenizer, V
    theirs = cm.read_tensors(path, "cpu")
    shape = tuple(theirs.shape) if isinstance(theirs, torch.Tensor) else None
    if shape != (V,):
        raise UserError(
            f"expected a tensor of {V:,} numbers in {path}, one for each token of the tokenizer beside it, got shape "
            f"{shape}: they do not belong together, get both from the same run"
        )
    return tokenizer, int((theirs != counts).sum())


def read_checkpoint(found: Found, vocab_size) -> tuple[dict, dict]:
    """
    (state dict with our keys and padded vocabulary in its original precision, meta data) of a nanochat checkpoint.

    Raises UserError when it is damaged, its weights do not fit its model_config, or it does not fit the tokenizer.
    """
    data, _, meta, _ = cm.load_checkpoint(found.folder, found.step)
    config = meta.get("model_config")
    where = f"{found.folder}, step {found.step}"
    if not isinstance(data, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in data.values()):
        raise UserError(f"the model of {where} is not a state dict of tensors")
    if isinstance(config, dict):
        cm.refuse_newer(config)
    if not isinstance(config, dict) or not all(type(n) is int and n > 0 for n in config.values()):
        raise UserError(f"the model_config of {where} is not what nanochat writes, positive numbers: {config!r}")
    if config.get("n_layer", 0) > len(data) or config.get("sequence_len", 0) > MAX_SEQUENCE_LEN:
        raise UserError(f"the model_config of {where} is impossibly large: {config!r}")
    if config.get("vocab_size") != vocab_size:
        raise UserError(
            f"{where} was trained with {config.get('vocab_size')} tokens, the tokenizer has {vocab_size:,}: "
            "they do not belong together"
        )
    dtypes = {key.removeprefix("_orig_mod."): tensor.dtype for key, tensor in data.items()}
    state = cm.build_model(data, config, "cpu").state_dict()
    return {key: tensor.to(dtypes[key]) for key, tensor in state.items()}, meta


def import_cache(source_dir, base_dir):
    """
    Copy tokenizer and checkpoints of the nanochat folder `source_dir` into `base_dir`, with our manifests.

    Everything is checked before anything is written, and nothing is overwritten: an existing tokenizer must be equal,
    a model's folder must not exist. Prints the progress. Raises UserError if the import is impossible.
    """
    source_dir, base_dir = Path(source_dir).expanduser(), Path(base_dir)
    if not source_dir.is_dir():
        raise UserError(f"there is no folder {source_dir}: name nanochat's cache folder with --from")
    if source_dir.resolve() == base_dir.resolve():
        raise UserError(
            f"{base_dir} is already the base folder: its files can be used as they are, there is nothing to import"
        )
    tokenizer, wrong = read_tokenizer(source_dir / "tokenizer")
    print(f"tokenizer: {tokenizer.get_vocab_size():,} tokens" + (f", {wrong:,} byte counts corrected" if wrong else ""))
    found = find_checkpoints(source_dir)
    if not found:
        raise UserError(f"there is no complete checkpoint in {source_dir}: expected {', '.join(cm.SOURCES.values())}")

    target = base_dir / "tokenizer"
    have_tokenizer = (target / BPE_FILE).exists() or (target / PICKLE_FILE).exists()
    if have_tokenizer and RustBPETokenizer.from_directory(target).checksum() != tokenizer.checksum():
        raise UserError(f"{target} holds another tokenizer: choose another NANOCHAT_BASE_DIR")
    for item in found:
        folder = base_dir / cm.SOURCES[item.source] / item.tag
        if folder.exists():
            raise UserError(f"{folder} exists: move it away, or choose another NANOCHAT_BASE_DIR")
    for item in found:
        read_checkpoint(item, tokenizer.get_vocab_size())
        print(f"checked {item}")
    size = sum((item.folder / f"model_{item.step:06d}.pt").stat().st_size for item in found)
    base_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(base_dir).free
    if free < 1.05 * size:
        raise UserError(f"{base_dir} has {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are needed: make room first")

    if not have_tokenizer:
        tokenizer.save(target)
        with atomic_write(target / BYTES_FILE) as file:
            torch.save(count_token_bytes(tokenizer), file)
    for item in found:
        state, meta = read_checkpoint(item, tokenizer.get_vocab_size())
        folder = base_dir / cm.SOURCES[item.source] / item.tag
        meta = {**meta, "imported_from": "nanochat", "tokenizer": tokenizer.checksum()}
        cm.save_checkpoint(folder, item.step, state, None, meta)
        print(f"written {item} to {folder}")
