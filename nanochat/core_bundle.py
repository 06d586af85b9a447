"""
The evaluation bundle of the CORE metric: download, loading, and checks.

It is a folder with core.yaml (the tasks), eval_meta_data.csv (their random baselines in percent) and eval_data/ (one
JSON object per line). See core_eval for the three types of tasks.
"""

import csv
import io
import json
import os
import random
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from nanochat.common import UserError, get_base_dir
from nanochat.download import fetch
from nanochat.sources import read_text

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"

TEXT = (str, int, float)  # a number is read as its digits
ITEM_KEYS = {  # required keys of an item of each type
    "multiple_choice": {"query": TEXT, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": TEXT, "gold": int},
    "language_modeling": {"context": TEXT, "continuation": TEXT},
}


@dataclass(frozen=True)
class TaskMeta:
    label: str
    task_type: str
    dataset_uri: str
    num_fewshot: int = 0
    continuation_delimiter: str = " "
    random_baseline: float = 0.0  # accuracy of guessing, 0 to 1


def get_bundle_dir() -> Path:
    return get_base_dir() / "eval_bundle"


def has_bundle() -> bool:
    return (get_bundle_dir() / "core.yaml").is_file()


def how_to_get_bundle() -> str:
    path = get_bundle_dir() / "core.yaml"
    return f"run `python -m scripts.prepare`, or unpack {BUNDLE_URL} so that {path} exists"


def download_bundle(url=BUNDLE_URL) -> Path:
    """
    Download the zip with a progress bar and unpack it to its folder, completely or not at all; returns the folder.

    Raises UserError if the download fails or is not a bundle.
    """
    bundle_dir = get_bundle_dir()
    if has_bundle():
        return bundle_dir
    if bundle_dir.exists():
        raise UserError(f"{bundle_dir} is there but has no core.yaml: move it away, then download again")
    archive = bundle_dir.with_name(f"{bundle_dir.name}.zip")
    if reason := fetch(url, archive):
        raise UserError(
            f"could not download the evaluation bundle ({reason}): try again, "
            f"or fetch it elsewhere and unpack it to {bundle_dir}"
        )
    with tempfile.TemporaryDirectory(prefix=f".{bundle_dir.name}.", dir=bundle_dir.parent) as folder:
        unpacked = Path(folder, "unpacked")
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(unpacked)  # checks every CRC and stays inside the folder
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"the file from {url} is not a valid zip ({error}): try again") from error
        finally:
            archive.unlink()  # damaged or unpacked, it is not needed any more
        configs = sorted(unpacked.rglob("core.yaml"))
        if not configs:
            raise UserError(f"the zip at {url} has no core.yaml in it: it is not an evaluation bundle")
        os.rename(configs[0].parent, bundle_dir)
    return bundle_dir


def load_bundle(max_per_task=-1) -> list[tuple[TaskMeta, list[dict]]]:
    """
    The tasks of the bundle with their items, shuffled by a fixed seed, at most max_per_task of each if that is > 0.

    Raises UserError naming the file and line of an error in the bundle.
    """
    bundle_dir = get_bundle_dir()
    if not has_bundle():
        raise UserError(f"there is no evaluation bundle in {bundle_dir}: {how_to_get_bundle()}")
    config_path = bundle_dir / "core.yaml"
    baselines = _read_baselines(bundle_dir / "eval_meta_data.csv")
    tasks = []
    for entry in _read_config(config_path):
        meta = _read_meta(entry, baselines, config_path)
        data_path = bundle_dir / "eval_data" / meta.dataset_uri
        data = _read_items(data_path, meta.task_type)
        random.Random(1337).shuffle(data)  # files are often sorted by class, which a subset should not be
        if max_per_task > 0:
            data = data[:max_per_task]
        if len(data) <= meta.num_fewshot:
            raise UserError(
                f"task {meta.label}: {meta.num_fewshot} examples for each prompt are drawn from the other "
                f"items, but there are only {len(data)} items: look at more than {meta.num_fewshot} of each task "
                "(--max_per_task, or in base_train --core_metric_max_per_task)"
            )
        tasks.append((meta, data))
    labels = [meta.label for meta, _ in tasks]
    if len(set(labels)) < len(labels):
        raise UserError(f"{config_path}: each label must occur once, got {', '.join(sorted(labels))}")
    return tasks


def _read_config(path) -> list[dict]:
    try:
        config = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    tasks = config.get("icl_tasks") if isinstance(config, dict) else None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise UserError(f"{path}: expected a list of tasks under the key icl_tasks, got {tasks!r}")
    return tasks


def _read_baselines(path) -> dict[str, tuple[int, str]]:
    """Task label → (line number, random baseline as text)."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    for column in ("Eval Task", "Random baseline"):
        if column not in (reader.fieldnames or []):
            raise UserError(f"{path}, line 1: expected a column {column!r}, got {reader.fieldnames}")
    return {row["Eval Task"]: (reader.line_num, row["Random baseline"]) for row in reader}


def _read_meta(entry, baselines, path) -> TaskMeta:
    where = f"{path}, task {entry.get('label')!r}"
    for key in ("label", "dataset_uri", "num_fewshot", "icl_task_type"):
        if key not in entry:
            raise UserError(f"{where}: the key {key!r} is missing")
    if entry["icl_task_type"] not in ITEM_KEYS:
        raise UserError(f"{where}: icl_task_type must be one of {list(ITEM_KEYS)}, got {entry['icl_task_type']!r}")
    shots = entry["num_fewshot"]
    if not isinstance(shots, list) or not shots or not isinstance(shots[0], int) or shots[0] < 0:
        raise UserError(f"{where}: num_fewshot must be a list with one number, 0 or more, got {shots!r}")
    csv_path = path.with_name("eval_meta_data.csv")
    if entry["label"] not in baselines:
        raise UserError(f"{csv_path}: no line for the task {entry['label']!r}")
    line, percent = baselines[entry["label"]]
    try:
        baseline = float(percent) / 100
    except (TypeError, ValueError):
        baseline = -1.0
    if not 0 <= baseline < 1:
        raise UserError(f"{csv_path}, line {line}: Random baseline must be a percentage below 100, got {percent!r}")
    delimiter = entry.get("continuation_delimiter", " ")
    return TaskMeta(entry["label"], entry["icl_task_type"], entry["dataset_uri"], shots[0], delimiter, baseline)


def _read_items(path, task_type) -> list[dict]:
    items = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would split inside strings
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
        problem = _problem(item, task_type)
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        items.append(item)
    if not items:
        raise UserError(f"{path}: expected one JSON object per line, got an empty file")
    return items


def _problem(item, task_type) -> str | None:
    """What is wrong with an item, or None."""
    if not isinstance(item, dict):
        return f"expected a JSON object, got {type(item).__name__}"
    for key, kind in ITEM_KEYS[task_type].items():
        if key not in item:
            return f"a {task_type} item needs the key {key!r}, got {sorted(item)}"
        if not isinstance(item[key], kind):
            expected = {TEXT: "a text", list: "a list of texts", int: "an index"}[kind]
            return f"{key!r} must be {expected}, got {item[key]!r}"
        if kind is list and not all(isinstance(option, TEXT) for option in item[key]):
            return f"{key!r} must be a list of texts, got {item[key]!r}"
    pairs = candidates(item, task_type)
    if not all(continuation for _, continuation in pairs):
        return "a continuation is empty, so there is nothing to score"
    if not 0 <= item.get("gold", 0) < len(pairs):
        return f"'gold' must be the index of one of {len(pairs)} options, got {item['gold']}"
    return None


def candidates(item, task_type) -> list[tuple[str, str]]:
    """The (context, continuation) pairs among which the item asks to choose; index `gold` is right."""
    if task_type == "multiple_choice":
        return [(str(item["query"]), str(choice)) for choice in item["choices"]]
    if task_type == "schema":
        return [(str(context), str(item["continuation"])) for context in item["context_options"]]
    return [(str(item["context"]).strip(), str(item["continuation"]))]
