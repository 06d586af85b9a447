"""How often a chat model's answers are right."""

import math
from dataclasses import dataclass, field

import torch

from nanochat.common import UserError, get_dist_info, sum_over_ranks
from nanochat.engine import Engine
from tasks.mixtures import BASELINES


@dataclass
class Score:
    """What became of `total` problems. samples: (conversation, answer, whether it is right) of some."""

    passed: int
    total: int
    samples: list = field(default_factory=list)

    @property
    def accuracy(self) -> float:
        return self.passed / self.total


def evaluate(
    task,
    model,
    tokenizer,
    max_problems=None,
    num_samples=1,
    max_new_tokens=512,
    temperature=0.0,
    top_k=50,
    batch_size=8,
    keep=(),
    progress=None,
    make_session=None,
) -> Score:
    """
    Score a model on a task; under torchrun the ranks share the problems, and all get the same result.

    A generative problem counts as solved when one of num_samples answers is right, and not when it does not fit into
    the plain context; a categorical one when the right letter has the largest logit of all its letters. keep: numbers
    of the problems to return as samples.
    progress(done, of) is called on every rank. make_session(seed=…): what a generated answer attends to; None for
    the plain context.
    Raises UserError for a task without problems.
    """
    total = len(task) if max_problems is None else min(len(task), max_problems)
    if total < 1:
        raise UserError("expected at least one problem to evaluate, got none: raise --max-problems")
    if task.eval_type == "categorical":
        solved = _categorical(task, model, tokenizer, total, batch_size)
    else:
        options = {"max_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k}
        solved = _generative(task, Engine(model, tokenizer), tokenizer, total, num_samples, options, make_session)
    world_size = get_dist_info()[3]
    score = Score(0, total)
    for index, (conversation, answer, right) in zip(_own(total), solved, strict=True):
        score.passed += right
        if index in keep:
            score.samples.append((conversation, answer, right))
        if progress:
            progress(min(total, index - index % world_size + world_size), total)
    score.passed = sum_over_ranks(torch.tensor(score.passed, device=model.get_device())).item()
    return score


def _own(total):
    _, rank, _, world_size = get_dist_info()
    return range(rank, total, world_size)


def _generative(task, engine, tokenizer, total, num_samples, options, make_session):
    for index in _own(total):
        conversation = task[index]
        prompt = tokenizer.render_for_completion(conversation)
        if make_session is None and len(prompt) > engine.model.max_seq_len:
            yield conversation, f"(none: {len(prompt):,} tokens do not fit)", False
            continue
        rows, _ = engine.generate_batch(prompt, num_samples, seed=index, make_session=make_session, **options)
        answers = [tokenizer.decode(row[len(prompt) :]) for row in rows]
        rights = [bool(task.evaluate(conversation, answer)) for answer in answers]
        best = rights.index(True) if any(rights) else 0
        yield conversation, answers[best], rights[best]


@torch.inference_mode()
def _categorical(task, model, tokenizer, total, batch_size):
    """No generation: the logits after the prompt, of the letters alone; prompts padded at their ends."""
    own = list(_own(total))
    pad_id = tokenizer.get_bos_token_id()
    for start in range(0, len(own), batch_size):
        conversations = [task[index] for index in own[start : start + batch_size]]
        prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad_id, device=model.get_device())
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        logits = model(ids)
        for row, (conversation, prompt) in enumerate(zip(conversations, prompts, strict=True)):
            letters = conversation["letters"]
            letter_ids = [_single_token(tokenizer, letter) for letter in letters]
            answer = letters[logits[row, len(prompt) - 1, letter_ids].argmax().item()]
            yield conversation, answer, bool(task.evaluate(conversation, answer))


def _single_token(tokenizer, letter) -> int:
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise ValueError(f"expected the letter {letter!r} to be one token, got {len(ids)}")
    return ids[0]


def chat_core(accuracies: dict[str, float]) -> float:
    """Mean over tasks of (accuracy − guessing) / (1 − guessing): 0 for guessing, 1 for knowing."""
    centered = [(accuracy - BASELINES[name]) / (1 - BASELINES[name]) for name, accuracy in accuracies.items()]
    return sum(centered) / len(centered)


def pass_at_k(n: int, right: int, k: int) -> float:
    """
    Probability that k of n answers, `right` of which are right, hold a right one: 1 − C(n − right, k) / C(n, k).

    The unbiased estimate of Chen et al. 2021 (arXiv:2107.03374), section 2.1.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)
