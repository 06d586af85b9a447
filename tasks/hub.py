"""
Splits of datasets on the Hugging Face hub, as sequences of dict rows.

The hub serves these datasets as parquet files, so that `requests` and pyarrow, which are here for the pretraining
text, do what the `datasets` library would add forty packages for. A split is fetched once, turned into an Arrow
file and from then on memory-mapped: many processes share it and none holds it in its own memory.

    $NANOCHAT_BASE_DIR/task_data/<repo, "/" as "__">/<config>/<split>.arrow

A file <split>.parquet or <split>.jsonl that a person puts there is taken instead, and nothing is fetched.
"""

import json
import os
import re
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import requests
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.utils import build_hf_headers

from nanochat.common import UserError, atomic_write, get_base_dir
from nanochat.download import download, locked

SHUFFLE_SEED = 42
BATCH_ROWS = 1000
# (revision, pattern of the split's files). Authors upload `config/split-…` or, for a dataset with one config,
# `data/split-…`; for all others the hub's own conversion is on a branch.
LAYOUTS = [
    ("main", r"(?:{config}|data)/{split}-[0-9]+-of-[0-9]+[^/]*\.parquet"),
    ("refs/convert/parquet", r"{config}/{split}/[0-9]+\.parquet"),
]


class Rows:
    """Rows of an Arrow table or of a list of dicts, in a given order."""

    def __init__(self, rows, order=None):
        self.rows = rows
        self.order = range(len(rows)) if order is None else order

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index: int) -> dict:
        index = int(self.order[index])
        return self.rows.slice(index, 1).to_pylist()[0] if isinstance(self.rows, pa.Table) else self.rows[index]

    def shuffled(self, seed: int = SHUFFLE_SEED):
        """The same rows in a fixed random order, the one of `datasets.Dataset.shuffle(seed)`."""
        return Rows(self.rows, np.random.default_rng(seed).permutation(len(self.rows)))


def load_split(repo: str, config: str, split: str, columns=()) -> Rows:
    """
    The rows of a split; `columns` names those that must be there.

    Raises UserError when the split is neither here nor to be had, or lacks a column.
    """
    folder = get_base_dir() / "task_data" / repo.replace("/", "__") / config
    paths = [folder / f"{split}.{suffix}" for suffix in ("parquet", "jsonl", "arrow")]
    path = next((path for path in paths if path.exists()), paths[-1])
    if not path.exists():
        _fetch(repo, config, split, path)
    read = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".arrow": _read_arrow}[path.suffix]
    rows = read(path)
    have = rows.column_names if isinstance(rows, pa.Table) else set(rows[0]).intersection(*rows)
    if missing := [name for name in columns if name not in have]:
        raise UserError(
            f"{path}: expected columns {', '.join(columns)}; no {', '.join(missing)} there: replace the file"
        )
    return Rows(rows)


# ---------------------------------------------------------------------------------------------------------
# Reading


def _read_parquet(path):
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"expected a whole parquet file, cannot read {path} ({error}): replace it") from error


def _read_arrow(path):
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path} ({error}): delete it, it will be fetched again") from error


def _read_jsonl(path):
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: expected a JSON object, got broken JSON ({error}): mend it") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {line[:80]!r}: mend it")
        rows.append(row)
    if not rows:
        raise UserError(f"expected JSON objects, one a line, {path} is empty: replace it")
    return rows


# ---------------------------------------------------------------------------------------------------------
# Fetching


def _fetch(repo, config, split, path):
    """Download the split and write it to `path` as an Arrow file."""
    try:
        urls = _list_files(repo, config, split)
    except (requests.RequestException, ValueError) as error:
        raise _unavailable(repo, config, split, path, f"the hub could not be asked ({error})") from error
    if not urls:
        raise _unavailable(repo, config, split, path, "the hub has no parquet files of that name")
    parts = {path.with_name(f"{split}.{i:05d}.download"): url for i, url in enumerate(urls)}
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with locked(folder):  # of several processes one fetches, the others wait and find it
            if path.exists():
                return
            if failed := download(parts, headers=build_hf_headers()):
                raise _unavailable(repo, config, split, path, f"download failed ({next(iter(failed.values()))})")
            _convert(list(parts), path)
            for part in parts:
                part.unlink()
    finally:
        os.close(folder)


def _list_files(repo, config, split) -> list[str]:
    """URLs of the split's parquet files, in order; none when the hub has no such split."""
    if constants.HF_HUB_OFFLINE:
        raise requests.ConnectionError("HF_HUB_OFFLINE is set")
    for revision, pattern in LAYOUTS:
        pattern = re.compile(pattern.format(config=re.escape(config), split=re.escape(split)))
        url = f"{constants.ENDPOINT}/api/datasets/{repo}/tree/{quote(revision, safe='')}?recursive=true"
        names = []
        while url:  # the list comes in pages
            with requests.get(url, headers=build_hf_headers(), timeout=(10, 60)) as response:
                if response.status_code == 404:  # no such branch
                    break
                response.raise_for_status()
                names += [entry["path"] for entry in response.json() if pattern.fullmatch(entry["path"])]
                url = response.links.get("next", {}).get("url")
        if names:
            return [hf_hub_url(repo, name, repo_type="dataset", revision=revision) for name in sorted(names)]
    return []


def _convert(sources, target: Path):
    with atomic_write(target) as file:
        writer = None
        for source in sources:
            with pq.ParquetFile(source) as parquet:
                writer = writer or pa.ipc.new_file(file, parquet.schema_arrow)
                for batch in parquet.iter_batches(BATCH_ROWS):
                    writer.write_batch(batch)
        writer.close()


def _unavailable(repo, config, split, path, reason):
    return UserError(
        f"expected the split {split!r} of the dataset {repo} ({config}), but {reason}. Run again with the network up;"
        f" or copy the split to {path.with_suffix('.parquet')} (or .jsonl, one JSON object a line);"
        " or train and evaluate without the hub with --tasks local"
    )
