"""
Streams: trees on disk that outlive the process (`--mc_tree disk`).

    NAME/                  Arrays with the tokens; facts: the tokenizer's checksum, and what the owner adds, such as
                           the focus of a conversation
    NAME/gists-<id>/       Arrays level_1, level_2, …: gists of these tokens by one model's networks

The tokens are the data; gists are derived from them and can be computed again. Appending commits tokens before their
gists, and truncating cuts gists before tokens, so that the gists may lag behind the tokens but are never ahead of them;
a session that opens the stream computes the missing ones. Another model, or further training, has another <id>: its
gists are computed beside the old ones, which are used until the new ones are complete.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import re
import shutil
import tempfile
import time
import weakref
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megacontext.arrays import Arrays, Damaged
from megacontext.lensnet import key_size
from megacontext.tree import GIST_DTYPE, MegaContextTree, RamStore
from nanochat.checkpoint_manager import checkpoint_root, weights_checksum
from nanochat.common import UserError, get_base_dir
from nanochat.sources import take
from nanochat.tokenizer import get_tokenizer

logger = logging.getLogger(__name__)

SHAPE = "n_embd", "key_size", "block_size", "deep"  # facts of a gist key that determine the shape of gists
SPILL_TOKENS = 16384  # tokens kept in memory before a commit
INGEST_CHARS = 100_000  # characters tokenized at a time
PIECE_TOKENS = 65536  # tokens decoded at a time


def _name(level):
    return f"level_{level}" if level else "tokens"


class DiskStore:
    """
    A tree.Store of one stream: committed values are in files, later ones in memory.

    tokens, gists: Arrays; gists may be None. If the arrays are open for reading only, new values stay in memory and are
    lost on `close`. device: of the values that `get` returns.
    """

    def __init__(self, tokens: Arrays, gists: Arrays | None, block_size: int, device="cpu"):
        self.tokens, self.gists, self.block_size, self.device = tokens, gists, block_size, torch.device(device)
        self.end = lambda: None  # called by `close`
        self._new = []  # a RamStore per level, of the values after the committed ones
        num_tokens = tokens.rows("tokens")
        self._kept = [num_tokens]  # committed values per level
        while (level := len(self._kept)) <= len(gists.names if gists else ()):
            self._kept.append(min(gists.rows(_name(level)), num_tokens // block_size**level))

    def append(self, level, values):
        self.device = values.device
        self._level(level).append(0, values)

    def _level(self, level):
        while level >= len(self._new):
            self._new.append(RamStore(GIST_DTYPE))
        if level == len(self._kept):
            self._kept.append(0)
        return self._new[level]

    def count(self, level):
        if level >= len(self._kept):
            return 0
        return self._kept[level] + (self._new[level].count(0) if level < len(self._new) else 0)

    def get(self, level, index):
        kept, new = self._kept[level], self._level(level)
        if not new.count(0):
            return self._committed(level, index)
        if not kept or not (old := index < kept).any():
            return new.get(0, index - kept)
        values = self._committed(level, index.where(old, 0))
        newer = new.get(0, (index - kept).clamp(min=0))
        return values.where(old.view(*old.shape, *[1] * (values.dim() - 2)), newer)

    def _committed(self, level, index):
        places = index.cpu().numpy().ravel()
        if level == 0:
            ids = self.tokens.read("tokens", places).astype(np.int64)
            return torch.from_numpy(ids).view(index.shape).to(self.device)
        rows = torch.from_numpy(self.gists.read(_name(level), places))
        rows = rows.view(torch.bfloat16) if self.gists.dtype(_name(level)) == "bfloat16" else rows
        return rows.view(*index.shape, -1).to(self.device)

    def truncate(self, level, count):
        new = self._level(level)
        new.truncate(0, max(0, count - self._kept[level])) if new.count(0) else None
        self._kept[level] = min(self._kept[level], count)

    def settle(self):
        spans = zip(self._new[:2], (1, self.block_size), strict=False)
        large = any(new.count(0) * span >= SPILL_TOKENS for new, span in spans)
        if large and self.gists and self.gists.write:
            self.commit()

    def commit(self, **facts):
        """
        Write all values durably, with these facts beside the tokens. Raises UserError if writing fails; the values then
        stay in memory.
        """
        for arrays, levels in ((self.gists, range(1, len(self._kept))), (self.tokens, range(1))):
            cut = {_name(level): self._kept[level] for level in levels if self._kept[level] < arrays.rows(_name(level))}
            if cut and arrays.write:
                arrays.truncate(cut)
        self._keep(self.tokens, range(1), facts)
        self._keep(self.gists, range(1, len(self._new)), {})

    def _keep(self, arrays, levels, facts):
        grown = [level for level in levels if self._level(level).count(0)]
        for level in grown:
            values = self._new[level].get(0, torch.arange(self._new[level].count(0), device=self.device)[None])
            arrays.append(_name(level), *_as_rows(values[0].cpu()))
        if grown or facts:
            arrays.commit(**facts)
        for level in grown:
            self._kept[level] = arrays.rows(_name(level))
            self._new[level].truncate(0, 0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(new.nbytes for new in self._new)

    def close(self):
        self.tokens.close()
        if self.gists:
            self.gists.close()
        self.end()


def _as_rows(values):
    """(values as numpy rows [n, width], name of their dtype in the files, or None for that of numpy)."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.uint16).numpy(), "bfloat16"
    return (values if values.is_floating_point() else values[:, None]).numpy(), None


# ---------------------------------------------------------------------------------------------------------
# Folders


def streams_dir() -> Path:
    """The folder of the named streams."""
    return private_folder(get_base_dir() / "streams")


def private_folder(path) -> Path:
    path.mkdir(parents=True, mode=0o700, exist_ok=True)
    return path


def list_streams() -> list[Path]:
    """The folders of all streams, by name."""
    return sorted(path for path in streams_dir().iterdir() if path.is_dir() and path.name[0] != ".")


def stream_folder(name) -> Path:
    """The folder of a stream. Raises UserError for a name that cannot be one."""
    if not re.fullmatch(r"\w[\w.+=@-]{0,99}", name):
        rule = "1 to 100 letters, digits and _ . + = @ -, beginning with a letter, a digit or _"
        raise UserError(f"expected a stream's name of {rule}, got {name!r}")
    return streams_dir() / name


def gist_key_of(source, meta, tokenizer, config) -> dict:
    """
    The gist key of a checkpoint: the facts that determine its gists. meta: from `pretrained.load`; config: MCConfig.
    """
    folder = checkpoint_root(source) / meta["model_tag"]
    return {
        "tokenizer": tokenizer.checksum(),
        "vocab_size": tokenizer.get_vocab_size(),
        "model": meta.get("weights") or weights_checksum(folder, meta["step"]),
        "networks": weights_checksum(folder, meta["step"], "mc"),
        "n_embd": meta["model_config"]["n_embd"],
        **({"deep": deep} if (deep := config.deep_layers(meta["model_config"]["n_layer"])) else {}),
        "key_size": key_size(meta["model_config"]["n_embd"]),
        "block_size": config.block_size,
    }


def create_stream(folder, gist_key, **facts):
    """Create an empty stream for the tokenizer that the key names. Raises UserError if the folder exists."""
    private_folder(Path(folder).parent)
    _create_tokens(folder, gist_key["vocab_size"], tokenizer=gist_key["tokenizer"], **facts).close()


def _create_tokens(folder, vocab_size, **facts):
    return Arrays.create(folder, facts, tokens=("uint16" if vocab_size <= 65536 else "uint32", 1))


def open_store(folder, gist_key, device="cpu", write=False) -> DiskStore:
    """
    The store of a stream with the gists of this key, or with another set of the same shape that covers more of it.

    Raises UserError if the stream belongs to another tokenizer, is damaged, or (write=True) has another writer.
    """
    tokens = Arrays(folder, write)
    try:
        _check_tokenizer(tokens, gist_key["tokenizer"])
        own, usable = _gists_folder(folder, gist_key), gist_sets(folder, gist_key)
        best = max({own: -1} | usable, key=lambda path: (usable.get(path, -1), path == own))
        gists = _open_or_create(best, gist_key) if write else Arrays(best) if best in usable else None
        return DiskStore(tokens, gists, gist_key["block_size"], device)
    except BaseException:
        tokens.close()
        raise


def _gists_folder(folder, gist_key):
    return Path(folder) / f"gists-{hashlib.sha256(json.dumps(gist_key, sort_keys=True).encode()).hexdigest()[:12]}"


def _open_or_create(path, gist_key):
    """Arrays of gists, open for writing; created empty if they are missing or damaged."""
    if path.exists():
        try:
            return Arrays(path, write=True)
        except Damaged as error:
            logger.warning("gists are made again: %s", error)
            delete_stream(path)
    return Arrays.create(path, gist_key)


def size_of(folder) -> int:
    """Bytes of the files of a stream, or of one of its folders."""
    size = 0
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # SQLite's log has just gone
            size += path.stat().st_size if path.is_file() else 0
    return size


def gist_sets(folder, gist_key=None) -> dict[Path, int]:
    """Folder → number of level-1 gists, for each readable set of gists of a stream that has the shape of this key."""
    found = {}
    for path in sorted(Path(folder).glob("gists-*")):
        with contextlib.suppress(Damaged), contextlib.closing(Arrays(path)) as gists:
            if gist_key is None or all(gists.facts.get(key) == gist_key.get(key) for key in SHAPE):
                found[path] = gists.rows(_name(1))
    return found


def missing_gists(folder, gist_key) -> int:
    """Number of blocks of a stream that have no gist of this key."""
    with contextlib.closing(Arrays(folder)) as tokens:
        blocks = tokens.rows("tokens") // gist_key["block_size"]
    return blocks - gist_sets(folder, gist_key).get(_gists_folder(folder, gist_key), 0)


def make_gists(folder, gist_key, gist_fn, embed_fn, device="cpu"):
    """
    Compute the missing gists of this key while others may use the stream; yields the number of blocks done so far. It
    continues where an earlier call was interrupted.
    """
    tokens, gists = Arrays(folder), _open_or_create(_gists_folder(folder, gist_key), gist_key)
    store = DiskStore(tokens, gists, gist_key["block_size"], device)
    try:
        for _ in MegaContextTree(gist_fn, gist_key["block_size"], store, embed_fn).complete():
            yield store.count(1)
        store.commit()
    finally:
        store.close()


def compact(folder, gist_key):
    """
    Verify a whole stream, shrink its files to the committed rows, and delete the gists of other keys.

    Processes that have those gists open can still read them. Raises Damaged, or UserError if there is a writer.
    """
    own = _gists_folder(folder, gist_key)
    for path in (Path(folder), own):
        with contextlib.closing(Arrays(path, write=True)) as arrays:
            arrays.check()
            arrays.trim()
    for path in Path(folder).glob("gists-*"):
        if path != own:
            delete_stream(path)


def delete_stream(folder):
    """Delete a folder of tokens or of gists, also an incomplete one. Raises UserError if it has a writer."""
    with contextlib.suppress(Damaged):  # nobody can be using it
        Arrays(folder, write=True).close()
    shutil.rmtree(folder)


# ---------------------------------------------------------------------------------------------------------
# Text


class Progress(NamedTuple):
    """Documents and characters read by an ingestion, and tokens in the stream."""

    documents: int
    characters: int
    tokens: int


def ingest(tree, documents, tokenizer, source="", commit_seconds=2.0):
    """
    Append documents, each after a BOS token, to a tree over a DiskStore; yields the Progress after each commit.

    source: an identifier of these documents. If the stream's last ingestion had the same source and was interrupted, it
    is resumed. An ingestion without a source cannot be resumed; if it also has no documents, an interrupted one before
    it still can be.
    """
    store, last = tree.store, tree.store.tokens.facts.get("ingested", {})
    done = Progress(0, 0, tree.num_tokens)
    if source and last.get("source") == source:
        done = Progress(**last["progress"])
        tree.truncate(done.tokens)  # the rest is part of a document
    documents = itertools.islice(documents, done.documents, None)
    texts = take(documents, INGEST_CHARS)
    if not texts and not source:
        store.commit()
        yield done
        return
    store.commit(ingested={"source": source, "progress": done._asdict()})
    committed, bos = time.monotonic(), np.array([tokenizer.get_bos_token_id()], np.uint32)
    while texts:
        parts = [part for ids in tokenizer.encode_to_numpy(texts) for part in (bos, ids)]
        ids = torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
        tree.append(ids.to(store.device))
        done = Progress(done.documents + len(texts), done.characters + sum(map(len, texts)), tree.num_tokens)
        if time.monotonic() - committed >= commit_seconds:
            store.commit(ingested={"source": source, "progress": done._asdict()})
            committed = time.monotonic()
            yield done
        texts = take(documents, INGEST_CHARS)
    store.commit(ingested={"source": source, "progress": done._asdict()})
    yield done


def tokenizer_of(tokens: Arrays):
    """This machine's tokenizer. Raises UserError if the stream was written with another one."""
    tokenizer = get_tokenizer()
    _check_tokenizer(tokens, tokenizer.checksum())
    return tokenizer


def _check_tokenizer(tokens, checksum):
    if tokens.facts.get("tokenizer") != checksum:
        raise UserError(f"{tokens.folder} was written with another tokenizer: put that back, or make a new stream")


def token_ids(tokens: Arrays, start, end) -> list[int]:
    """The tokens in [start, end), fewer where the stream ends before."""
    return tokens.slice("tokens", start, min(end, tokens.rows("tokens")))[:, 0].tolist()


def export_documents(tokens: Arrays, tokenizer):
    """Yield the texts of the documents of a stream."""
    bos, rest = tokenizer.get_bos_token_id(), []
    for first in range(0, tokens.rows("tokens"), PIECE_TOKENS):
        ids = token_ids(tokens, first, first + PIECE_TOKENS)
        while bos in ids:
            at = ids.index(bos)
            if rest or at:
                yield tokenizer.decode(rest + ids[:at])
            rest, ids = [], ids[at + 1 :]
        rest += ids
    if rest:
        yield tokenizer.decode(rest)


# ---------------------------------------------------------------------------------------------------------
# Stores of a session


def scratch_store(block_size):
    """A store on disk that is deleted at the end of its session."""
    root = private_folder(get_base_dir() / "scratch")
    _sweep(root)
    folder = Path(tempfile.mkdtemp(dir=root))
    store = DiskStore(_create_tokens(folder, 2**32), Arrays.create(folder / "gists"), block_size)
    store.end = weakref.finalize(store, shutil.rmtree, folder, ignore_errors=True)
    return store


@lru_cache
def _sweep(root):
    """Delete the folders that killed processes left, once per process."""
    for left in root.iterdir():
        with contextlib.suppress(FileNotFoundError, UserError):  # another process was faster; in use
            if time.time() - left.stat().st_mtime > 60:
                delete_stream(left)
