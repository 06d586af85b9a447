"""
Text that is already on this machine, as documents; and documents as parquet shards.

A hash of a document's content alone decides whether it is for training or for validation. So the split stays
the same when files are renamed or more training shards are wanted, and all copies of a text are on one side.
"""

import codecs
import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, atomic_write

SEED = 1337
VAL_FRACTION = 0.05
MIN_GROUPS = 32  # ranks and streams share out row groups, so that even a small split should have this many
GROUP_DOCS, GROUP_CHARS = 64, 4_000_000  # a row group's limits
SHARD_CHARS = 250_000_000
PIECE_CHARS = 100_000  # a text file longer than this becomes several documents, cut at line ends
SCHEMA = pa.schema([("text", pa.string())])

# ---------------------------------------------------------------------------------------------------------
# Files


def stdlib_files() -> list[Path]:
    """The running Python's own sources, without installed packages, shuffled by a fixed seed."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ("site-packages", "dist-packages")]
        files += [Path(parent, name) for name in names if name.endswith(".py")]
    return _shuffled(files, root)


def folder_files(folder: Path, exclude: Path, skipped: dict) -> list[Path]:
    """
    Files under `folder`, also in linked folders, shuffled by a fixed seed, but nothing under `exclude`.

    What is left out is noted in `skipped` (path -> reason).
    """
    files, seen = [], {os.path.realpath(exclude)}
    for parent, folders, names in os.walk(folder, followlinks=True):
        skipped.update((Path(parent, name), "hidden") for name in folders + names if name.startswith("."))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if os.path.realpath(parent) in seen:  # a link to what was read, or to a folder above it
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        for path in (Path(parent, name) for name in names if not name.startswith(".")):
            if path.is_file():
                files.append(path)
            else:
                skipped[path] = "no files (pipes, dangling links)"
    return _shuffled(files, folder)


def _shuffled(files, root):
    files = sorted(files, key=lambda path: path.relative_to(root).as_posix())
    random.Random(SEED).shuffle(files)
    return files


# ---------------------------------------------------------------------------------------------------------
# Documents


COMPRESSED = (".gz", ".bz2", ".lz4", ".zst")
BYTE_ORDER_MARKS = {  # UTF-32's first: it begins as UTF-16's does
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


TO_UTF8 = "iconv -f WINDOWS-1252 -t UTF-8"


class NotText(ValueError):
    """A file cannot be read as text. The message is the reason, worded to follow a count of files."""


def _encoding(head: bytes) -> str:
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")


@contextlib.contextmanager
def open_text(path):
    """
    A text file open for reading: UTF-8, or what its byte order mark says; unpacked if it ends in .gz or the like.

    Raises NotText after checking the whole file, so that no caller starts to read a file that fails later.
    """
    try:
        with pa.input_stream(str(path)) as file:
            block = file.read(1 << 20)
            encoding = _encoding(block)
            decoder = codecs.getincrementaldecoder(encoding)()
            while block:
                if "\0" in decoder.decode(block):
                    raise NotText("binary")
                block = file.read(1 << 20)
            decoder.decode(b"", final=True)
    except PermissionError:
        raise NotText("unreadable") from None
    except UnicodeDecodeError:
        raise NotText("binary" if b"\0" in block else f"not in UTF-8 (convert them: {TO_UTF8})") from None
    except OSError as error:
        if path.suffix not in COMPRESSED:
            raise
        raise NotText(f"damaged {path.suffix}") from error
    with pa.input_stream(str(path)) as file, io.TextIOWrapper(file, encoding) as text:
        yield text


def read_text(path: Path) -> str:
    """All of a small text file. Raises UserError naming the line where it is no text."""
    try:
        return decode_text(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from error


def decode_text(content: bytes, place) -> str:
    """Text in UTF-8, or in what its byte order mark says. Raises UserError naming the line where it is neither."""
    try:
        return content.decode(_encoding(content))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{place}:{line}: expected UTF-8, got the byte 0x{content[error.start]:02x}: convert it ({TO_UTF8})"
        ) from error


def stdlib_documents(files, skipped: dict):
    """Yield one document per file."""
    for path in files:
        try:
            with open_text(path) as file:
                yield file.read()
        except NotText as error:
            skipped[path] = str(error)


def folder_documents(files, skipped: dict):
    """
    Yield the documents of files of any kind: rows of .parquet, lines of .jsonl, all else that is text.

    Other files are noted in `skipped`. Raises UserError for a .jsonl line or a .parquet file without text.
    """
    for path in files:
        if path.suffix == ".parquet":
            yield from _parquet_documents(path)
            continue
        name = path.stem if path.suffix in COMPRESSED else path.name
        try:
            with open_text(path) as file:
                yield from (
                    _jsonl_documents(path, file) if name.endswith((".jsonl", ".ndjson")) else _text_documents(file)
                )
        except NotText as error:
            skipped[path] = str(error)


def _text_documents(file):
    while piece := file.read(PIECE_CHARS):
        yield piece + (file.readline(PIECE_CHARS) if len(piece) == PIECE_CHARS else "")


def _jsonl_documents(path, file):
    for number, line in enumerate(file, start=1):
        if not line.isspace():
            yield _json_text(line, f"{path}:{number}")


def _json_text(line, place):
    expected = "expected a JSON object with a string under 'text' or 'content'"
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{place}: {expected}, got broken JSON ({error}): mend the line") from error
    text = record.get("text", record.get("content")) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise UserError(f"{place}: {expected}, got {line.strip()[:80]!r}: mend the line")
    return text.encode(errors="replace").decode()  # JSON can spell half of a surrogate pair, UTF-8 cannot


def _parquet_documents(path):
    try:
        with pq.ParquetFile(path) as file:
            column = text_column(path, file.schema_arrow)
            for batch in file.iter_batches(batch_size=GROUP_DOCS, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as parquet ({error}): mend or remove it") from error


def text_column(path, schema: pa.Schema) -> str:
    """The string column named `text`, or else `content`. Raises UserError when there is none."""
    for name in ("text", "content"):
        kind = schema.field(name).type if schema.names.count(name) == 1 else None
        kind = kind.value_type if kind and pa.types.is_dictionary(kind) else kind
        if kind in (pa.string(), pa.large_string(), pa.string_view()):
            return name
    columns = ", ".join(f"{field.name}: {field.type}" for field in schema)
    raise UserError(f"{path}: expected one string column 'text' or 'content', got [{columns}]: replace the file")


def first(characters, texts):
    """Yield texts of an iterator until they have this many characters; the others stay in the iterator."""
    while characters > 0 and (text := next(texts, None)) is not None:
        yield text
        characters -= len(text)


def take(texts, characters, docs=None) -> list[str]:
    """The next texts of an iterator, until they have this many characters, but at most `docs`; fewer at its end."""
    return list(itertools.islice(first(characters, texts), docs))


def mixed(texts, others, part):
    """Yield the texts, mixed with so many of the endless `others` that these are this part of all characters."""
    due = 0.0
    for text in texts:
        yield text
        due += len(text) * part / (1 - part)
        while due > 0:
            yield (other := next(others))
            due -= len(other)


# ---------------------------------------------------------------------------------------------------------
# Shards


def make_shards(documents, train_paths, val_path) -> dict:
    """
    Split the documents by content and write them: validation to one shard, training to as many as it takes.

    documents: called with a label for each pass, or None for a first look; returns an iterable of str. Empty
    ones are dropped. train_paths: an iterable; when it ends, further training text is left out.
    Returns {"train": {...}, "val": {...}}, what `write_shards` wrote.
    Raises UserError when there are not two different documents.
    """

    def texts(label):
        return (text for text in documents(label) if text and not text.isspace())

    threshold = val_threshold(texts(None))
    val = (text for text in texts("validation") if content_hash(text) < threshold)
    train = (text for text in texts("training") if content_hash(text) >= threshold)
    return {"val": write_shards(val, [val_path]), "train": write_shards(train, train_paths)}


def content_hash(text: str) -> int:
    """64 bits of BLAKE2b of the text as UTF-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def val_threshold(texts) -> int:
    """Documents whose content hash is below this are for validation: VAL_FRACTION, at least one."""
    hashes = {content_hash(text) for text in itertools.islice(texts, 1000)}
    if not hashes:
        raise UserError("expected text, found none: name a folder of text, Markdown, code, .jsonl or .parquet")
    if len(hashes) == 1:
        raise UserError("expected two different documents or more (training, validation), found one: add text")
    return min(max(int(VAL_FRACTION * 2**64), min(hashes) + 1), max(hashes))


def write_shards(texts, paths) -> dict:
    """
    Write texts to parquet files at `paths`, in order, about SHARD_CHARS in each, until texts or paths are used up.

    Returns {"shards", "documents", "characters": counts, "complete": whether all of the texts were written}.
    """
    groups = row_groups(texts)
    group = next(groups, None)
    shards = documents = characters = 0
    for path in paths:
        if group is None:
            break
        size = 0
        options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True}
        with atomic_write(path) as file, pq.ParquetWriter(file, SCHEMA, **options) as writer:
            while group is not None and size < SHARD_CHARS:
                writer.write_table(pa.table({"text": group}, schema=SCHEMA), row_group_size=len(group))
                size += sum(map(len, group))
                documents += len(group)
                group = next(groups, None)
        characters += size
        shards += 1
    return {"shards": shards, "documents": documents, "characters": characters, "complete": group is None}


def row_groups(texts):
    """Yield lists of texts: at most GROUP_DOCS in one, fewer when there would not be MIN_GROUPS lists."""
    texts = iter(texts)
    head = take(texts, 2 * MIN_GROUPS * GROUP_CHARS, MIN_GROUPS * GROUP_DOCS)
    docs = min(GROUP_DOCS, max(1, len(head) // MIN_GROUPS))
    texts = itertools.chain(head, texts)
    while group := take(texts, GROUP_CHARS, docs):
        yield group
