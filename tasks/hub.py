"""
Splits of datasets on the Hugging Face hub, by its library `datasets`: fetched once to its own cache ($HF_HOME), and
memory-mapped from there, so that many processes share them. A file that you put there is taken instead of the hub's:

    $NANOCHAT_BASE_DIR/task_data/<repo, "/" as "__">/<config>/<split>.parquet (or .jsonl)
"""

import io

import pyarrow as pa
import pyarrow.json

from nanochat.common import UserError, get_base_dir
from nanochat.sources import read_text
from tasks.common import Task

SHUFFLE_SEED = 42


def load_split(repo: str, config: str, split: str, columns=()):
    """
    The rows of a split in a fixed random order, a `datasets.Dataset`; `columns` names those that must be there.

    Raises UserError if the split can be neither found nor downloaded, or lacks a column.
    """
    import datasets  # here: it takes a second, and the local tasks need no more than this machine
    from huggingface_hub.errors import HTTPError

    folder = get_base_dir() / "task_data" / repo.replace("/", "__") / config
    paths = [folder / f"{split}.parquet", folder / f"{split}.jsonl"]
    path = next((path for path in paths if path.exists()), None)
    content = read_text(path).encode() if path == paths[1] else None
    try:
        if content is not None:
            options = pa.json.ReadOptions(block_size=len(content) + 1)  # no row is longer than a block
            rows = datasets.Dataset(pa.json.read_json(io.BytesIO(content), options))
        elif path:
            rows = datasets.Dataset.from_parquet(str(path))  # load_dataset would tell the hub of it
        else:
            rows = datasets.load_dataset(repo, config, split=split)
        if not len(rows):
            raise ValueError("it is empty")
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        if path:
            raise UserError(f"expected rows in {path}, cannot read it ({reason}): replace it") from error
        raise UserError(
            f"expected the split {split!r} of the dataset {repo} ({config}), but cannot get it ({reason}). Run again "
            f"with the network up; or copy the split to {folder / split}.parquet (or .jsonl, one JSON object per line);"
            " or train and evaluate without the hub with --tasks local"
        ) from error
    if missing := [name for name in columns if name not in rows.column_names]:
        place = path or f"{repo} ({config}, {split})"
        raise UserError(f"{place}: expected columns {', '.join(columns)}; no {', '.join(missing)} there: replace it")
    return rows.shuffle(seed=SHUFFLE_SEED, keep_in_memory=True)


class HubTask(Task):
    """A task on a dataset of the hub. splits: its configurations, each with the names of their splits."""

    repo, columns, splits = "", (), {}

    def __init__(self, subset: str, split: str, **slicing):
        super().__init__(**slicing)
        if split not in self.splits.get(subset, ()):
            raise ValueError(f"{type(self).__name__} has no subset {subset!r} with a split {split!r}")
        self.rows = load_split(self.repo, subset, split, self.columns)

    def num_examples(self):
        return len(self.rows)
