"""
The DCLM CORE metric: in-context learning on 22 tasks, each centered on its random baseline, averaged.

Source: Li et al. 2024, DataComp-LM (arXiv 2406.11794). A task is of one of three types:
  multiple_choice     one context, several continuations; the lowest mean loss per token wins
  schema              several contexts, one continuation; the context that makes it likeliest wins
  language_modeling   the continuation must equal the model's greedy continuation, token for token

Shapes: B candidates of one item, T tokens, V vocabulary.
"""

import random
from itertools import count

import torch
import torch.nn.functional as F

from nanochat.common import get_dist_info, sum_over_ranks
from nanochat.core_bundle import TaskMeta, candidates, load_bundle

# ---------------------------------------------------------------------------------------------------------
# From an item to rows of tokens, and which tokens are scored


def fewshot_examples(data, index, num_fewshot) -> list[dict]:
    """Other items of the task to show before item `index`; always the same for the same index."""
    others = [i for i in range(len(data)) if i != index]
    return [data[i] for i in random.Random(1234 + index).sample(others, num_fewshot)]


def render_prompts(item, task_type, delimiter, examples) -> list[str]:
    """The texts to score: one per candidate; for language modeling the prompt without and with its end."""
    solved = [candidates(example, task_type)[example.get("gold", 0)] for example in examples]
    shown = "".join(f"{context}{delimiter}{continuation}\n\n" for context, continuation in solved)
    pairs = candidates(item, task_type)
    prompts = [f"{shown}{context}{delimiter}{continuation}" for context, continuation in pairs]
    if task_type == "language_modeling":
        # A space before a word belongs to the word's token, so the bare prompt must not end with it.
        prompts.insert(0, f"{shown}{pairs[0][0]}{delimiter}".rstrip())
    return prompts


def common_length(rows) -> int:
    """Number of leading tokens that all rows share."""
    return next(
        (i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1), min(len(row) for row in rows)
    )


def scored_rows(rows, task_type, max_tokens=None) -> list[tuple[list[int], int]]:
    """
    (tokens, start) of each row to score: tokens[start:] are scored.

    Tokens are compared instead of text lengths, so a tokenizer may merge across the boundary.
    A row longer than max_tokens loses its beginning. At least one token is scored, with at least one before it.
    """
    if task_type == "schema":
        counted = common_length([row[::-1] for row in rows])
        starts = [len(row) - counted for row in rows]
    else:
        start = common_length(rows)
        rows = rows[1:] if task_type == "language_modeling" else rows
        start = min(start, min(len(row) for row in rows) - 1)  # one choice can be the beginning of another
        starts = [start] * len(rows)
    cuts = [max(0, len(row) - max_tokens) if max_tokens else 0 for row in rows]
    return [(row[cut:], max(1, start - cut)) for row, start, cut in zip(rows, starts, cuts, strict=True)]


# ---------------------------------------------------------------------------------------------------------
# Scoring


def logits_of_ends(model, rows, padding, device) -> list[torch.Tensor]:
    """For each row (tokens, start) the logits for tokens[start:], [n, V]. model(ids [B, T]) → logits [B, T, V]."""
    # Padding after the end of a row cannot influence a causal model's logits within it; its last token is not read.
    ids = torch.full((len(rows), max(len(row) for row, _ in rows) - 1), padding, dtype=torch.long)
    for i, (row, _) in enumerate(rows):
        ids[i, : len(row) - 1] = torch.tensor(row[:-1])
    logits = model(ids.to(device))  # those at t predict token t + 1
    return [logits[i, start - 1 : len(row) - 1] for i, (row, start) in enumerate(rows)]


@torch.inference_mode()
def is_correct(model, tokenizer, data, index, device, meta: TaskMeta) -> bool:
    """
    Whether the model gets item `index` right. model(ids [B, T]) → logits [B, T, V]; or, if it has a method of that
    name, model.logits_of_ends(rows) as above.
    """
    item, bos = data[index], tokenizer.get_bos_token_id()
    examples = fewshot_examples(data, index, meta.num_fewshot)
    prompts = render_prompts(item, meta.task_type, meta.continuation_delimiter, examples)
    tokens = tokenizer.encode(prompts, prepend=bos)
    rows = scored_rows(tokens, meta.task_type, getattr(model, "max_seq_len", None))
    if hasattr(model, "logits_of_ends"):
        ends = model.logits_of_ends(rows)
    else:
        ends = logits_of_ends(model, rows, bos, device)
    targets = [torch.tensor(row[start:], device=device) for row, start in rows]
    if meta.task_type == "language_modeling":
        return bool((ends[0].argmax(dim=-1) == targets[0]).all())
    losses = torch.stack([F.cross_entropy(*end) for end in zip((e.float() for e in ends), targets, strict=True)])
    return losses.argmin().item() == item["gold"]


def evaluate_task(model, tokenizer, data, device, task_meta: TaskMeta, progress=None) -> float:
    """Accuracy (0 to 1) on a task's items, shared over ranks. progress() is called after each one here."""
    _, rank, _, world_size = get_dist_info()
    correct = torch.zeros((), dtype=torch.long, device=device)
    for index in range(rank, len(data), world_size):
        correct += is_correct(model, tokenizer, data, index, device, task_meta)
        if progress:
            progress()
    return sum_over_ranks(correct).item() / len(data)


def centered(accuracy: float, baseline: float) -> float:
    """(accuracy − baseline) / (1 − baseline): 0 for guessing, 1 for perfect."""
    return (accuracy - baseline) / (1 - baseline)


def evaluate_core(model, tokenizer, device, max_per_task=-1, progress=None) -> dict:
    """
    CORE of a base model: {"results": {label: accuracy}, "centered_results": {…}, "core_metric": their mean}.

    max_per_task > 0 limits the number of items per task. progress(label, done, total) is called after
    each of this rank's items. Raises UserError when the bundle is missing or malformed.
    """
    tasks = load_bundle(max_per_task)
    _, rank, _, world_size = get_dist_info()
    total = sum(len(range(rank, len(data), world_size)) for _, data in tasks)
    done, results, centered_results = count(1), {}, {}
    for meta, data in tasks:
        step = progress and (lambda label=meta.label: progress(label, next(done), total))
        results[meta.label] = evaluate_task(model, tokenizer, data, device, meta, step)
        centered_results[meta.label] = centered(results[meta.label], meta.random_baseline)
    core_metric = sum(centered_results.values()) / len(centered_results)
    return {"results": results, "centered_results": centered_results, "core_metric": core_metric}
