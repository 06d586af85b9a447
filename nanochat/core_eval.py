"""
The DCLM CORE metric: in-context learning on 22 tasks, each centered on its random baseline, averaged.

Source: Li et al. 2024, DataComp-LM (arXiv 2406.11794). Every task is one of three types:
  multiple_choice     one context, several continuations; the lowest mean loss a token wins
  schema              several contexts, one continuation; the context that makes it likeliest wins
  language_modeling   the continuation must be what the model itself would say, token for token

The bundle is a folder: core.yaml (the tasks), eval_meta_data.csv (their random baselines in percent) and
eval_data/ (a JSON object a line). Shapes: B candidates of one item, T tokens, V vocabulary.
"""

import csv
import io
import json
import os
import random
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import requests
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml

from nanochat.common import UserError, get_base_dir, get_dist_info

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"

TEXT = (str, int, float)  # a number stands for its digits
ITEM_KEYS = {  # what an item of each type must have
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


# ---------------------------------------------------------------------------------------------------------
# The bundle


def get_bundle_dir() -> Path:
    return get_base_dir() / "eval_bundle"


def has_bundle(bundle_dir=None) -> bool:
    return (Path(bundle_dir or get_bundle_dir()) / "core.yaml").is_file()


def how_to_get_bundle(bundle_dir=None) -> str:
    folder = Path(bundle_dir or get_bundle_dir())
    return (
        f"run `python -m scripts.base_eval --download`, or unpack {BUNDLE_URL} "
        f"so that {folder / 'core.yaml'} exists"
    )


def download_bundle(url=BUNDLE_URL, bundle_dir=None, progress=None) -> Path:
    """
    Fetch the zip and unpack it to bundle_dir, which appears whole or not at all. Returns bundle_dir.

    progress(bytes_done, bytes_total or None) is called as data arrives. Raises UserError when the download
    fails, the archive is damaged, or bundle_dir is already there without being a bundle.
    """
    bundle_dir = Path(bundle_dir or get_bundle_dir())
    if has_bundle(bundle_dir):
        return bundle_dir
    if bundle_dir.exists():
        raise UserError(f"{bundle_dir} is there but has no core.yaml: move it away, then download again")
    bundle_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".eval_bundle.", dir=bundle_dir.parent) as folder:
        archive, unpacked = Path(folder, "eval_bundle.zip"), Path(folder, "unpacked")
        try:
            with requests.get(url, stream=True, timeout=30) as response, open(archive, "wb") as file:
                response.raise_for_status()
                total = int(response.headers.get("Content-Length", 0)) or None
                for chunk in response.iter_content(2**20):
                    file.write(chunk)
                    if progress:
                        progress(file.tell(), total)
            with zipfile.ZipFile(archive) as bundle:
                bundle.extractall(unpacked)  # checks every CRC and keeps inside the folder
        except requests.RequestException as error:
            raise UserError(
                f"could not download the evaluation bundle from {url} ({error}): try again"
            ) from error
        except zipfile.BadZipFile as error:
            raise UserError(f"what {url} sent is not a sound zip ({error}): try again") from error
        root = next((path.parent for path in sorted(unpacked.rglob("core.yaml"))), None)
        if root is None:
            raise UserError(f"the archive at {url} has no core.yaml in it: it is not an evaluation bundle")
        os.rename(root, bundle_dir)
    return bundle_dir


def load_bundle(bundle_dir=None, max_per_task=-1) -> list[tuple[TaskMeta, list[dict]]]:
    """
    Every task of the bundle with its items, shuffled by a fixed seed and cut to max_per_task if that is > 0.

    Raises UserError naming file and line where the bundle is not as it should be.
    """
    bundle_dir = Path(bundle_dir or get_bundle_dir())
    if not has_bundle(bundle_dir):
        raise UserError(f"there is no evaluation bundle in {bundle_dir}: {how_to_get_bundle(bundle_dir)}")
    config_path = bundle_dir / "core.yaml"
    baselines = _read_baselines(bundle_dir / "eval_meta_data.csv")
    tasks = []
    for entry in _read_config(config_path):
        meta = _read_meta(entry, baselines, config_path)
        data_path = bundle_dir / "eval_data" / meta.dataset_uri
        data = _read_items(data_path, meta.task_type)
        random.Random(1337).shuffle(data)  # files are often ordered by class; a subset should not be
        if max_per_task > 0:
            data = data[:max_per_task]
        if len(data) <= meta.num_fewshot:
            raise UserError(
                f"task {meta.label}: {meta.num_fewshot} examples for each prompt are drawn from the other "
                f"items, but there are only {len(data)} items: set max_per_task above {meta.num_fewshot}"
            )
        tasks.append((meta, data))
    labels = [meta.label for meta, _ in tasks]
    if len(set(labels)) < len(labels):
        raise UserError(f"{config_path}: each label must occur once, got {', '.join(sorted(labels))}")
    return tasks


def _read_text(path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}): is the evaluation bundle complete?") from error


def _read_config(path) -> list[dict]:
    try:
        config = yaml.safe_load(_read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    tasks = config.get("icl_tasks") if isinstance(config, dict) else None
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise UserError(f"{path}: expected a list of tasks under the key icl_tasks, got {tasks!r}")
    return tasks


def _read_baselines(path) -> dict[str, tuple[int, str]]:
    """Task label → (line number, random baseline as it is written)."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
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
        raise UserError(
            f"{where}: icl_task_type must be one of {list(ITEM_KEYS)}, got {entry['icl_task_type']!r}"
        )
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
        raise UserError(
            f"{csv_path}, line {line}: Random baseline must be a percentage below 100, got {percent!r}"
        )
    delimiter = entry.get("continuation_delimiter", " ")
    return TaskMeta(
        entry["label"], entry["icl_task_type"], entry["dataset_uri"], shots[0], delimiter, baseline
    )


def _read_items(path, task_type) -> list[dict]:
    items = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):  # splitlines would cut inside strings
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
        raise UserError(f"{path}: expected one JSON object a line, got an empty file")
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


# ---------------------------------------------------------------------------------------------------------
# From an item to rows of tokens, and which of them count


def candidates(item, task_type) -> list[tuple[str, str]]:
    """The (context, continuation) pairs among which the item asks to choose; index `gold` is right."""
    if task_type == "multiple_choice":
        return [(str(item["query"]), str(choice)) for choice in item["choices"]]
    if task_type == "schema":
        return [(str(context), str(item["continuation"])) for context in item["context_options"]]
    return [(str(item["context"]).strip(), str(item["continuation"]))]


def fewshot_examples(data, index, num_fewshot) -> list[dict]:
    """Other items of the task to show before item `index`: always the same ones for the same index."""
    others = [i for i in range(len(data)) if i != index]
    return [data[i] for i in random.Random(1234 + index).sample(others, num_fewshot)]


def render_prompts(item, task_type, delimiter, examples) -> list[str]:
    """The texts to score: one a candidate; for language modeling the prompt without and with its end."""
    solved = [candidates(example, task_type)[example.get("gold", 0)] for example in examples]
    shown = "".join(f"{context}{delimiter}{continuation}\n\n" for context, continuation in solved)
    pairs = candidates(item, task_type)
    prompts = [f"{shown}{context}{delimiter}{continuation}" for context, continuation in pairs]
    if task_type == "language_modeling":
        # A space before a word belongs to the word's token, so the bare prompt must not end with it.
        prompts.insert(0, f"{shown}{pairs[0][0]}{delimiter}".rstrip())
    return prompts


def common_length(rows) -> int:
    """How many leading tokens all rows share."""
    return next(
        (i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1),
        min(len(row) for row in rows),
    )


def scored_rows(rows, task_type, max_tokens=None) -> list[tuple[list[int], int]]:
    """
    (tokens, start) of every row to score: tokens[start:] are what counts.

    Tokens are compared, never text lengths, so a tokenizer that merges over the boundary does no harm.
    A row longer than max_tokens loses its beginning. At least one token counts, and one comes before it.
    """
    if task_type == "schema":
        counted = common_length([row[::-1] for row in rows])
        starts = [len(row) - counted for row in rows]
    else:
        start = common_length(rows)
        rows = rows[1:] if task_type == "language_modeling" else rows
        start = min(start, min(len(row) for row in rows) - 1)  # a choice may be the beginning of another
        starts = [start] * len(rows)
    cuts = [max(0, len(row) - max_tokens) if max_tokens else 0 for row in rows]
    return [(row[cut:], max(1, start - cut)) for row, start, cut in zip(rows, starts, cuts, strict=True)]


# ---------------------------------------------------------------------------------------------------------
# Scoring


@torch.inference_mode()
def is_correct(model, tokenizer, data, index, device, meta: TaskMeta) -> bool:
    """Whether the model gets item `index` right. model(ids [B, T]) → logits [B, T, V]."""
    item, bos = data[index], tokenizer.get_bos_token_id()
    examples = fewshot_examples(data, index, meta.num_fewshot)
    prompts = render_prompts(item, meta.task_type, meta.continuation_delimiter, examples)
    tokens = tokenizer.encode(prompts, prepend=bos)
    rows = scored_rows(tokens, meta.task_type, getattr(model, "max_seq_len", None))

    # Padding comes after a row's end, where a causal model cannot see it from the row.
    ids = torch.full((len(rows), max(len(row) for row, _ in rows)), bos, dtype=torch.long)
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    ids = ids.to(device)
    logits = model(ids)
    parts = [  # (logits, targets) of the tokens that count; the logits at t are about token t + 1
        (logits[i, start - 1 : len(row) - 1], ids[i, start : len(row)]) for i, (row, start) in enumerate(rows)
    ]
    if meta.task_type == "language_modeling":
        ((scores, targets),) = parts
        return bool((scores.argmax(dim=-1) == targets).all())
    losses = torch.stack([F.cross_entropy(scores.float(), targets) for scores, targets in parts])
    return losses.argmin().item() == item["gold"]


def evaluate_task(model, tokenizer, data, device, task_meta: TaskMeta, progress=None) -> float:
    """Accuracy (0 to 1) on one task's items, shared over ranks. progress() is called after every item here."""
    _, rank, _, world_size = get_dist_info()
    correct = torch.zeros((), dtype=torch.long, device=device)
    for index in range(rank, len(data), world_size):
        correct += is_correct(model, tokenizer, data, index, device, task_meta)
        if progress:
            progress()
    if dist.is_initialized():
        dist.all_reduce(correct)
    return correct.item() / len(data)


def centered(accuracy: float, baseline: float) -> float:
    """0 for guessing, 1 for perfect: (accuracy − baseline) / (1 − baseline)."""
    return (accuracy - baseline) / (1 - baseline)


def evaluate_core(model, tokenizer, device, max_per_task=-1, bundle_dir=None, progress=None) -> dict:
    """
    CORE of a base model: {"results": {label: accuracy}, "centered_results": {…}, "core_metric": mean of these}.

    max_per_task > 0 looks at that many items of each task only. progress(label, done, total) is called after
    each of this rank's items. Raises UserError when the bundle is missing or malformed.
    """
    tasks = load_bundle(bundle_dir, max_per_task)
    _, rank, _, world_size = get_dist_info()
    done, total = 0, sum(len(range(rank, len(data), world_size)) for _, data in tasks)
    results, centered_results = {}, {}
    for meta, data in tasks:

        def step(label=meta.label):
            nonlocal done
            done += 1
            if progress:
                progress(label, done, total)

        accuracy = evaluate_task(model, tokenizer, data, device, meta, step)
        results[meta.label] = accuracy
        centered_results[meta.label] = centered(accuracy, meta.random_baseline)
    core_metric = sum(centered_results.values()) / len(centered_results)
    return {"results": results, "centered_results": centered_results, "core_metric": core_metric}
