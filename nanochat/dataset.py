"""
Pretraining text: parquet shards in $NANOCHAT_BASE_DIR/base_data, and the command that puts them there.

    python -m nanochat.dataset -n 8              # 8 training shards of FineWeb-Edu from the Hugging Face hub
    python -m nanochat.dataset --source stdlib   # Python's own standard library: about 30 MB, no network
    python -m nanochat.dataset --source ~/notes  # a folder of text, Markdown, code, .jsonl or .parquet files
    python -m nanochat.dataset --source recall   # generated: long documents with questions about earlier facts
    python -m nanochat.dataset --source stdlib --recall_part 0.5   # half and half

A shard is a parquet file with a string column `text` (or `content`), one document per row. The last shard by name is
the validation split. The command names them `shard_00000.parquet`, …, and always makes VAL_SHARD the last, so that it
is the same for every -n. Files of other names, put there by hand, are read too.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import shutil
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
from rich import progress

from nanochat import recall, sources
from nanochat.common import UserError, atomic_write, get_base_dir, locked
from nanochat.configurator import run, short
from nanochat.download import fetch_from_hub
from nanochat.ranges import Count, CountOr0, Fraction

HUB_DATASET = "karpathy/fineweb-edu-100b-shuffle"
VAL_SHARD = 1822  # the last of the 1823 shards of HUB_DATASET
SHARD_NAME = re.compile(r"shard_\d{5}\.parquet")
RECALL_SIZES = ("chars", "questions", "tables", "distractors", "min_distance", "max_distance", "times", "ask")
REMAKE = "delete it and run `python -m nanochat.dataset` again as before"


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def get_data_dir() -> Path:
    return get_base_dir() / "base_data"


# ---------------------------------------------------------------------------------------------------------
# Reading


def list_shards(data_dir: Path) -> list[Path]:
    """The shards in a folder that have the names we give, in order; none when there is no folder."""
    return sorted(path for path in data_dir.glob("shard_*.parquet") if SHARD_NAME.fullmatch(path.name))


def list_parquet_files(data_dir=None) -> list[Path]:
    """All parquet files by name, ours or not: the last is for validation. UserError if there are fewer than two."""
    data_dir = Path(data_dir or get_data_dir())
    paths = sorted(path for path in data_dir.glob("*.parquet") if not path.name.startswith("."))
    if len(paths) < 2:
        have = f"only {paths[0].name}" if paths else "none"
        raise UserError(
            f"expected at least two shards in {data_dir} (training, validation), found {have}: "
            "run `python -m nanochat.dataset -n 8`, or with `--source stdlib` if there is no network"
        )
    return paths


def list_row_groups(split: str, data_dir=None, processes=1) -> list[tuple[Path, int]]:
    """
    (file, row group) of all row groups of a split ("train" or "val") that have rows, in order.

    Raises UserError for a file that is not a whole parquet file with a column `text`, for an empty split, and for one
    with fewer row groups than processes to share them.
    """
    if split not in ("train", "val"):
        raise UserError(f"expected split 'train' or 'val', got {split!r}")
    paths = list_parquet_files(data_dir)
    paths = paths[:-1] if split == "train" else paths[-1:]
    found = []
    for path in paths:
        with _open_shard(path) as (file, _):
            groups = range(file.metadata.num_row_groups)
            found += [(path, group) for group in groups if file.metadata.row_group(group).num_rows]
    if not found:
        raise UserError(f"no rows in the {split} split ({paths[0].name} … in {paths[0].parent}): {REMAKE}")
    if len(found) < processes:
        raise UserError(
            f"the {split} split has {len(found)} row groups, too few for {processes} streams or processes to share: "
            "add data or take fewer (--streams)"
        )
    return found


def check_data(processes=1):
    """Raises UserError when training data is missing or broken, or too little for these processes to share."""
    for split in ("train", "val"):
        list_row_groups(split, processes=processes)


def read_row_group(path: Path, group: int) -> list[str]:
    """The texts of one row group, without nulls and empty strings. Raises UserError if it cannot be read."""
    with _open_shard(path) as (file, column):
        texts = file.read_row_group(group, columns=[column], use_threads=False).column(0)
        return [text for text in texts.to_pylist() if text]


@contextlib.contextmanager
def _open_shard(path):
    """(open pq.ParquetFile, its column of texts). Wrong bytes, met now or later in the block, are a UserError."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file, sources.text_column(path, file.schema_arrow)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"expected a whole parquet file, cannot read {path} ({error}): {REMAKE}") from error


def iter_documents(split: str, data_dir=None):
    """Yield the texts of a split, one list per row group; one pass."""
    for path, group in list_row_groups(split, data_dir):
        yield read_row_group(path, group)


# ---------------------------------------------------------------------------------------------------------
# What the folder holds


def read_source(data_dir: Path) -> dict:
    """What `source.json` says of the shards; those without the file came from the hub."""
    path = data_dir / "source.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"source": "hub"}
        record.get("sizes", {}).pop("depth", None)  # which earlier versions had
        return {"source": record["source"], **record}
    except (ValueError, AttributeError, KeyError) as error:
        raise UserError(f"expected a record of the source in {path}, got {error!r}: remove {data_dir}") from error


def check_source(data_dir: Path, source: str) -> dict:
    """
    What `read_source` returns; {} when there are no shards.

    Raises UserError if they come from another source than `source`: two kinds of text must not be mixed.
    """
    count = len(list(data_dir.glob("*.parquet")))
    if not count:
        return {}
    have = read_source(data_dir)
    if have["source"] != source:
        raise UserError(
            f"{data_dir} holds {count} shards from source {have['source']!r} already, but {source!r} is wanted: "
            f"set NANOCHAT_BASE_DIR to another folder, or remove {data_dir}"
        )
    return have


def write_source(data_dir: Path, record: dict):
    with atomic_write(data_dir / "source.json", "w") as file:
        json.dump(record, file, indent=2)


# ---------------------------------------------------------------------------------------------------------
# Filling it


def download_hub(num_files: int, workers: int, data_dir: Path) -> int:
    """
    Fetch num_files training shards (-1: all) and the validation shard; returns how many these are.

    Raises UserError naming the shards that failed; the others are kept.
    """
    count = VAL_SHARD if num_files == -1 else min(num_files, VAL_SHARD)
    names = [shard_name(index) for index in (VAL_SHARD, *range(count))]  # validation first: training needs it

    def missing():
        return [name for name in names if not (data_dir / name).exists()]

    check_source(data_dir, "hub")
    if not missing():  # without waiting for a process that fetches more
        return len(names)
    with locked(data_dir):
        check_source(data_dir, "hub")
        write_source(data_dir, {"source": "hub", "dataset": HUB_DATASET})
        failed = fetch_from_hub(HUB_DATASET, missing(), data_dir, workers)
    if failed:
        reasons = [f"  {name}: {reason}\n" for name, reason in failed.items()]
        more = f"  and {len(reasons) - 20} more\n" if len(reasons) > 20 else ""
        raise UserError(
            f"expected {len(names)} shards, {len(failed)} could not be downloaded:\n"
            f"{''.join(reasons[:20])}{more}"
            f"What is complete is kept in {data_dir}; run the same command again to go on. "
            "Without the hub, `--source stdlib` or `--source <folder>` make shards from local text."
        )
    return len(names)


def make_local(source, num_files, data_dir, recall_part=0.0, primer=0, seed=0, sizes=None) -> tuple[dict, bool]:
    """
    Make shards from the standard library or a folder, with at most num_files (-1: all) for training.

    recall_part: of the characters, from 0 to below 1, are of recall documents with this seed and these sizes, which
    stand between the others; before all of them come `primer` characters of recall.PRIMER. Returns and raises what
    `_make` does.
    """
    folder = None if source == "stdlib" else Path(source).expanduser().resolve()
    if folder and not folder.is_dir():
        raise UserError(f"expected --source hub, stdlib, recall or a folder, got {source!r}, which is not a folder")
    if not 0 <= recall_part < 1:
        raise UserError(f"expected --recall_part from 0 to below 1, got {recall_part} (--source recall is all of it)")

    def make_shards(train_paths, val_path):
        skipped = {}
        files = sources.folder_files(folder, get_base_dir(), skipped) if folder else sources.stdlib_files()
        read = sources.folder_documents if folder else sources.stdlib_documents

        def documents(label):
            texts = read(progress.track(files, label) if label else files, skipped)
            primers = sources.first(primer, _generated(seed, "primer", recall.PRIMER))
            if recall_part:
                texts = sources.mixed(texts, _generated(seed, "train", sizes), recall_part)
            return itertools.chain(primers, texts)

        try:
            made = sources.make_shards(documents, train_paths, val_path)
        except UserError as error:
            raise UserError(f"{error}{_left_out(Counter(skipped.values()))}") from error
        return made | {"skipped": dict(Counter(skipped.values()))}

    record = {"source": str(folder or source), "recall_part": recall_part, "primer": primer}
    record |= {"seed": seed, "sizes": asdict(sizes)} if recall_part or primer else {}
    return _make(record, make_shards, num_files, data_dir)


def _generated(seed, split, sizes):
    """Recall documents without end."""
    return (text for text, _ in recall.recall_documents(seed, sys.maxsize, split, **asdict(sizes)))


def _left_out(skipped: dict) -> str:
    return "; skipped: " + ", ".join(f"{count:,} {why}" for why, count in skipped.items()) if skipped else ""


def make_recall(seed: int, documents: int, sizes: recall.Sizes, num_files: int, data_dir: Path) -> tuple[dict, bool]:
    """
    Generate shards of recall documents and their answer key, with at most num_files (-1: all) for training. Returns and
    raises what `_make` does.
    """
    record = {"source": "recall", "seed": seed, "documents": documents, "sizes": asdict(sizes)}
    make_shards = partial(recall.make_shards, seed, documents, sizes, progress.track)
    return _make(record, make_shards, num_files, data_dir)


def _make(record, make_shards, num_files, data_dir) -> tuple[dict, bool]:
    """
    Replace the folder's shards by those that make_shards(train_paths, val_path) writes, unless they are there already.

    Returns (the content of source.json: `record` and what was written; whether nothing had to be done). Raises
    UserError if the folder holds shards that were made with other options.
    """
    with locked(data_dir):
        have = check_source(data_dir, record["source"])
        if have and not record.items() <= ({"recall_part": 0.0, "primer": 0} | have).items():
            raise UserError(
                f"{data_dir} holds documents made with other options already ({data_dir / 'source.json'}): "
                f"set NANOCHAT_BASE_DIR to another folder, or remove {data_dir}"
            )
        if _has_enough(have, num_files, data_dir):
            return have, True
        return _build(record | {"python": platform.python_version()}, make_shards, num_files, data_dir), False


def _has_enough(record, num_files, data_dir):
    """Whether all shards in `record` are there, and as many as requested."""
    if "train" not in record or (record["source"] == "recall" and not (data_dir / recall.KEY_FILE).exists()):
        return False
    train, count = record["train"], len(list_shards(data_dir)) - 1
    # Fewer than recorded: a shard was deleted, or the process was killed while moving them.
    return count >= train["shards"] and (train["complete"] or train["shards"] >= num_files != -1)


def _build(record, make_shards, num_files, data_dir):
    """Write shards to a temporary folder, then move all, so that no reader sees half a dataset; the whole record."""
    building = data_dir / ".building"
    shutil.rmtree(building, ignore_errors=True)
    indices = range(VAL_SHARD)[: num_files if num_files != -1 else None]
    record = record | make_shards((building / shard_name(i) for i in indices), building / shard_name(VAL_SHARD))
    write_source(data_dir, record)
    for path in set(list_shards(data_dir)) - {data_dir / path.name for path in building.iterdir()}:
        path.unlink()  # of a larger text that was here before
    for path in sorted(building.iterdir(), reverse=True):  # validation first
        os.replace(path, data_dir / path.name)
    building.rmdir()
    return record


# ---------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    num_files: Annotated[Count, short("-n")] = -1
    """number of training shards, -1 for all; the validation shard is fetched in addition"""
    num_workers: Annotated[Count, short("-w")] = 4
    """parallel downloads"""
    source: str = "hub"
    """hub (FineWeb-Edu), stdlib (Python's standard library), recall (generated documents that ask for facts stated
    earlier in them), or a folder of text, code, .jsonl, .parquet"""
    recall_part: Fraction = 0.0
    """stdlib, folder: fraction of the characters that are recall documents, mixed among the others, 0 to below 1"""
    recall_primer: CountOr0 = 0
    """stdlib, folder: characters of short recall documents before all others, such as 9,000,000, from which small
    models learn to look facts up"""
    # For --source recall, and for --recall_part
    seed: CountOr0 = 0
    """recall: random seed of the documents"""
    recall_documents: Count = 8000
    """recall: training documents; 5% more are for validation"""
    recall_chars: Count = recall.Sizes.chars
    """recall: characters of a document"""
    recall_questions: CountOr0 = recall.Sizes.questions
    """recall: facts of a document that are asked for"""
    recall_tables: CountOr0 = recall.Sizes.tables
    """recall: tables of a document; one cell of each is asked for"""
    recall_distractors: CountOr0 = recall.Sizes.distractors
    """recall: facts of a document that are not asked for"""
    recall_min_distance: Count = recall.Sizes.min_distance
    """recall: minimum distance from a fact to the answer in characters; distances are log-uniform"""
    recall_max_distance: Count = recall.Sizes.max_distance
    """recall: maximum distance from a fact to the answer in characters; -1 for the length of the document"""
    recall_times: Count = recall.Sizes.times
    """recall: number of times that each fact is asked for, each at its own distance"""
    recall_ask: bool = recall.Sizes.ask
    """recall: ask for facts; with 0 they are restated without a question, which a small model learns sooner"""


def main(config: Config):
    data_dir = get_data_dir()
    if config.source == "hub":
        count = download_hub(config.num_files, config.num_workers, data_dir)
        print(f"{count} shards of {HUB_DATASET} are in {data_dir}")
        return
    try:
        sizes = recall.Sizes(**{name: getattr(config, f"recall_{name}") for name in RECALL_SIZES})
        if config.source == "recall":
            made = make_recall(config.seed, config.recall_documents, sizes, config.num_files, data_dir)
        else:
            mixture = config.recall_part, config.recall_primer, config.seed, sizes
            made = make_local(config.source, config.num_files, data_dir, *mixture)
    except OSError as error:
        raise UserError(f"cannot write shards to {data_dir} ({error}): free some space or fix the folder") from error
    record, reused = made
    train, val = record["train"], record["val"]
    print(
        f"{'reusing' if reused else 'wrote'} {data_dir}: {train['shards']} training shard(s) with "
        f"{train['documents']:,} documents, {train['characters'] / 1e6:,.1f}M characters; validation with "
        f"{val['documents']:,} documents, {val['characters'] / 1e6:,.1f}M characters{_left_out(record.get('skipped'))}"
    )


if __name__ == "__main__":
    run(main, Config)
