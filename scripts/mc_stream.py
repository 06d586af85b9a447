"""
Streams: texts of any length, read once and kept on disk as trees, for conversations about them.

    python -m scripts.mc_stream create library ~/books notes.md    # a new stream of these folders and files
    python -m scripts.mc_stream append library more.jsonl.gz       # if interrupted, the same command continues
    python -m scripts.mc_stream append log < server.log
    python -m scripts.mc_stream list
    python -m scripts.mc_stream show library --find "white whale"  # its contents, and where a text occurs
    python -m scripts.mc_stream show library --at 120000           # the text from this token on
    python -m scripts.mc_stream compact library                    # verify it, delete other models' gists
    python -m scripts.mc_stream export library > library.jsonl     # a document per line, as `append` reads them
    python -m scripts.mc_stream delete library

    python -m scripts.chat_cli --mc --stream library
    python -m scripts.chat_web --mc --stream library

A stream holds tokens of one tokenizer, and gists of a model's networks. For a model that has been trained further,
`append` without a text computes its gists; chats use the old ones in the meantime.
"""

import hashlib
import itertools
import json
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megacontext import streams
from megacontext.arrays import Arrays
from megacontext.inference import MCInference, load_for_inference
from megacontext.reader import Reader
from megacontext.tree import MegaContextTree
from nanochat import pretrained
from nanochat.common import UserError, compute_init
from nanochat.configurator import run, short
from nanochat.find import find_text
from nanochat.loop import ProgressLine
from nanochat.pretrained import PretrainedOptions
from nanochat.ranges import Count, CountOr0
from nanochat.sources import decode_text, folder_documents, folder_files


@dataclass
class Config(PretrainedOptions):
    command: tyro.conf.Positional[Literal["create", "append", "list", "show", "compact", "delete", "export"]] = "list"
    """command, see above"""
    name: tyro.conf.Positional[str] = ""
    """name of the stream"""
    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """folders and files for create and append; by default the standard input, unless it is a terminal"""
    source: Annotated[str, short("-i")] = "sft"
    """stage of the model whose networks compute the gists: sft, mid, rl or base"""
    device_type: str = ""
    """cuda, cpu or mps; empty for the best available"""
    find: str = ""
    """show: a text to look for"""
    at: CountOr0 = -1
    """show: print the text from this token on"""
    length: Count = 500
    """show --at: tokens to print"""


class Model:
    """A checkpoint with its networks, which compute a stream's gists."""

    def __init__(self, config):
        self.device = compute_init(config.device_type)[-1]
        source, model, self.tokenizer, meta = pretrained.load(config, self.device, companion=True)
        networks, settings = load_for_inference(source, meta, self.device, MCInference(), model)
        self.reader = Reader(model, networks, settings)
        self.gist_key = streams.gist_key_of(source, meta, self.tokenizer, settings)

    def tree(self, folder, write=False):
        store = streams.open_store(folder, self.gist_key, self.device, write)
        return MegaContextTree(self.reader.node, self.gist_key["block_size"], store, self.reader.embed_for_decoding)


def list_files(inputs):
    """(the named files and those in the named folders, in order; path → reason for what is left out)."""
    files, skipped = [], {}
    for path in map(Path, inputs):
        if not path.exists():
            raise UserError(f"{path} is not there: name folders or files")
        found = folder_files(path, streams.streams_dir(), skipped) if path.is_dir() else [path]
        files += sorted(found)
    return files, skipped


def append(config, folder):
    """Append the inputs and compute missing gists."""
    files, skipped = list_files(config.inputs)
    model = Model(config)
    if config.command == "create":
        streams.create_stream(folder, model.gist_key)
    if files:
        sizes = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        source, total = hashlib.sha256(json.dumps(sizes).encode()).hexdigest(), sum(size for _, size, _ in sizes)
        documents = folder_documents(files, skipped)
    elif not sys.stdin.isatty():
        source, total, documents = "", None, standard_input()
    else:
        source, total, documents = "", 0, ()
    make_gists(model, folder)
    tree = model.tree(folder, write=True)
    for _ in tree.complete():
        pass
    before, start, line = tree.num_tokens, time.monotonic(), ProgressLine("reading", None, unit="token")
    for done in streams.ingest(tree, documents, model.tokenizer, source):
        speed = (done.tokens - before) / (time.monotonic() - start)
        part = min(1.0, done.characters / total) if total else None  # compressed files have more characters than bytes
        line.update(done.tokens, f"{speed:,.0f} per second", part)
    line.close()
    tree.store.close()
    reasons = sorted(set(skipped.values()))
    for reason in reasons:
        print(f"left out, {reason}: {sum(r == reason for r in skipped.values()):,}")
    print(f"{config.name}: {done.tokens:,} tokens, {done.tokens - before:,} of them new, {speed:,.0f} per second")


def standard_input():
    """Documents of a few lines each."""
    number = 0
    while lines := list(itertools.islice(sys.stdin.buffer, 1000)):
        yield decode_text(b"".join(lines), f"standard input, from line {number + 1}")
        number += len(lines)


def make_gists(model, folder):
    """Compute the gists of a model that is new to this stream; those of others stay."""
    missing, reader = streams.missing_gists(folder, model.gist_key), model.reader
    if not missing:
        return
    before, line = None, ProgressLine("gists", None, unit="block")
    for done in streams.make_gists(folder, model.gist_key, reader.node, reader.embed_for_decoding, model.device):
        before = done if before is None else before
        line.update(done - before, f"of {missing:,}", (done - before) / missing)
    line.close()


def show_list():
    rows = []
    for folder in streams.list_streams():
        try:
            tokens = Arrays(folder)
            rows.append((folder.name, f"{tokens.rows('tokens'):,} tokens, {streams.size_of(folder) / 1e6:,.1f} MB"))
            tokens.close()
        except UserError as error:
            rows.append((folder.name, f"cannot be read: {error}"))
    width = max((len(name) for name, _ in rows), default=0)
    print("\n".join(f"{name:{width}}  {text}" for name, text in rows) or "no streams: see mc_stream create")


def show(config, folder):
    tokens = Arrays(folder)
    print(f"{config.name}: {tokens.rows('tokens'):,} tokens in {folder}, {streams.size_of(folder) / 1e6:,.1f} MB")
    for path in streams.gist_sets(folder):
        gists = Arrays(path)
        levels = ", ".join(f"{gists.rows(name):,}" for name in gists.names)
        model, n_embd = gists.facts["model"][:12], gists.facts["n_embd"]
        print(f"gists of the model {model}…, {n_embd} wide, blocks of {gists.facts['block_size']}: {levels}")
    if config.at < 0 and not config.find:
        return
    tokenizer = streams.tokenizer_of(tokens)
    if config.find:
        found = find_text(partial(streams.token_ids, tokens), tokenizer, config.find, 0, tokens.rows("tokens"))
        for start, end in itertools.islice(found, 20):
            around = tokenizer.decode(streams.token_ids(tokens, max(0, start - 12), end + 12))
            print(f"{start:>12,}  {' '.join(around.split())}")
    if config.at >= 0:
        print(tokenizer.decode(streams.token_ids(tokens, config.at, config.at + config.length)))


def compact(config, folder):
    """Verify the stream, and delete truncated data and the gists of other models."""
    before, model = streams.size_of(folder), Model(config)
    make_gists(model, folder)
    streams.compact(folder, model.gist_key)
    sizes = f"{before / 1e6:,.1f} MB before, {streams.size_of(folder) / 1e6:,.1f} MB now"
    print(f"{config.name}: {sizes}; all of it was verified")


def main(config: Config):
    if config.command == "list":
        return show_list()
    folder = streams.stream_folder(config.name)
    if config.command != "create" and not folder.is_dir():
        raise UserError(f"there is no stream {config.name!r}: see mc_stream list, or make it with mc_stream create")
    if config.command in ("create", "append"):
        append(config, folder)
    elif config.command == "show":
        show(config, folder)
    elif config.command == "compact":
        compact(config, folder)
    elif config.command == "delete":
        streams.delete_stream(folder)
        print(f"{config.name} is deleted")
    else:
        tokens = Arrays(folder)
        for text in streams.export_documents(tokens, streams.tokenizer_of(tokens)):
            print(json.dumps({"text": text}, ensure_ascii=False))


if __name__ == "__main__":
    run(main, Config)
