"""
Import nanochat's tokenizer and checkpoints: check them, copy them, add checksums.

    python -m scripts.import_nanochat --from ~/.cache/nanochat

They are copied to $NANOCHAT_BASE_DIR. No code in the files is run, and no existing file is overwritten.

nanochat writes tokenizer/tokenizer.pkl and token_bytes.pt, and for each stage <stage>_checkpoints/<tag>/ with
model_%06d.pt (its keys may begin with `_orig_mod.`) and meta_%06d.json, without checksums. Optimizer states are not
imported: nanochat saves those of one rank only, with which no stage could be resumed exactly.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from nanochat import checkpoint_manager as cm
from nanochat.common import UserError, atomic_write, get_base_dir
from nanochat.configurator import run
from nanochat.tokenizer import BPE_FILE, BYTES_FILE, PICKLE_FILE, SPECIAL_TOKENS, RustBPETokenizer, count_token_bytes


@dataclass
class Config:
    source: Annotated[Path, tyro.conf.arg(name="from")]
    """cache folder of nanochat"""


def read_tokenizer(folder) -> tuple[RustBPETokenizer, int]:
    """
    (tokenizer, number of wrong entries in its token_bytes.pt) of a nanochat tokenizer folder.

    nanochat counted the bytes of decoded text, which is wrong for tokens that are parts of characters.
    Raises UserError if the files are invalid or do not belong together.
    """
    tokenizer = RustBPETokenizer.from_directory(folder)
    missing = [token for token in SPECIAL_TOKENS if token not in tokenizer.get_special_tokens()]
    if missing:
        raise UserError(f"the tokenizer in {folder} lacks {', '.join(missing)}: it is not one of nanochat's")
    counts, path = count_token_bytes(tokenizer), folder / BYTES_FILE
    theirs = cm.read_tensors(path, "cpu") if path.exists() else torch.zeros_like(counts)
    shape = tuple(theirs.shape) if isinstance(theirs, torch.Tensor) else None
    if shape != counts.shape:
        raise UserError(
            f"expected a tensor of {len(counts):,} numbers in {path}, one for each token of the tokenizer beside it, "
            f"got shape {shape}: they do not belong together, get both from the same run"
        )
    return tokenizer, int((theirs != counts).sum())


def read_checkpoint(folder, step, tokenizer) -> tuple[dict, dict]:
    """
    (state dict with our keys and padded vocabulary in its original precision, meta data) of a nanochat checkpoint.

    Raises UserError when it is damaged, its weights do not fit its model_config, or it does not fit the tokenizer.
    """
    data, _, meta, _ = cm.load_checkpoint(folder, step)
    model, V = cm.build_model(data, meta.get("model_config"), "cpu"), tokenizer.get_vocab_size()
    if model.config.vocab_size != V:
        raise UserError(
            f"{folder}, step {step}, was trained with {model.config.vocab_size:,} tokens, the tokenizer has {V:,}: "
            "they do not belong together"
        )
    dtypes = {key.removeprefix("_orig_mod."): tensor.dtype for key, tensor in data.items()}
    return {key: tensor.to(dtypes[key]) for key, tensor in model.state_dict().items()}, meta


def main(config: Config):
    source, target = config.source.expanduser(), get_base_dir()
    if not source.is_dir():
        raise UserError(f"there is no folder {source}: name nanochat's cache folder with --from")
    if source.resolve() == target.resolve():
        raise UserError(f"{target} is already the base folder: its files are used as they are, nothing to import")
    tokenizer, wrong = read_tokenizer(source / "tokenizer")
    print(f"tokenizer: {tokenizer.get_vocab_size():,} tokens" + (f", {wrong:,} byte counts corrected" if wrong else ""))
    folders = [path for name in cm.SOURCES.values() for path in sorted((source / name).glob("*")) if path.is_dir()]
    steps = {path: step for path in folders if (step := cm.find_last_step(path)) is not None}
    if not steps:
        raise UserError(f"there is no complete checkpoint in {source}: expected {', '.join(cm.SOURCES.values())}")

    # All is checked before anything is written
    kept = target / "tokenizer"
    is_new = not any((kept / name).exists() for name in (BPE_FILE, PICKLE_FILE))
    if not is_new and RustBPETokenizer.from_directory(kept).checksum() != tokenizer.checksum():
        raise UserError(f"{kept} holds another tokenizer: choose another NANOCHAT_BASE_DIR")
    for path, step in steps.items():
        if (folder := target / path.relative_to(source)).exists():
            raise UserError(f"{folder} exists: move it away, or choose another NANOCHAT_BASE_DIR")
        read_checkpoint(path, step, tokenizer)
        print(f"checked {path}, step {step:,}")
    cm.check_room(target, sum(next(path.glob(f"model_{step:06d}.pt")).stat().st_size for path, step in steps.items()))

    if is_new:
        tokenizer.save(kept)
        with atomic_write(kept / BYTES_FILE) as file:
            torch.save(count_token_bytes(tokenizer), file)
    for path, step in steps.items():
        state, meta = read_checkpoint(path, step, tokenizer)
        folder = target / path.relative_to(source)
        meta = {**meta, "imported_from": "nanochat", "tokenizer": tokenizer.checksum()}
        cm.save_checkpoint(folder, step, state, None, meta)
        print(f"written to {folder}")
    print("to talk to an imported chat model: python -m scripts.chat_cli")


if __name__ == "__main__":
    run(main, Config)
