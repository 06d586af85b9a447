"""
Reinforcement learning on problems with checkable answers.

    python -m scripts.chat_rl
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=default
    python -m scripts.chat_rl --tasks=local --max_new_tokens=48        # sums, on a CPU

On-policy REINFORCE: each step samples several answers to each of a few problems and raises the probability of those
with a reward above the mean for their problem. The sum over tokens is divided by the number of tokens in the step (as
in DAPO, arXiv:2503.14476). There is no reference model, no ratio and no clipping: each sample is used once, by the
model that generated it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from nanochat.common import UserError, autocast, compute_init, resolve_dtype, sum_dtype, sum_over_ranks
from nanochat.configurator import run
from nanochat.conversations import pad_rows
from nanochat.engine import Engine
from nanochat.loop import passes
from nanochat.options import FinetuningOptions
from nanochat.ranges import Count, CountOr0, Every, Fraction, Range
from nanochat.training import Training, parent_model
from tasks.mixtures import rl_tasks
from tasks.scoring import pass_at_k


@dataclass
class Config(FinetuningOptions):
    # What to train
    tasks: Literal["full", "local"] = "full"
    """full (GSM8K) or local (sums)"""
    source: str = "sft"
    """stage of the checkpoint to start from: base, mid, sft or rl"""
    save_every: Every = 60
    """steps between checkpoints; -1 for one at the end only"""
    # Sampling
    examples_per_step: Count = 16
    """problems per step, over all processes"""
    num_samples: Annotated[int, Range(2)] = 16
    """answers sampled per problem, which are compared with each other"""
    device_batch_size: Count = 8
    """answers per process in a batch, for sampling and for learning"""
    max_new_tokens: Count = 256
    """tokens per answer, at most"""
    temperature: Annotated[float, Range(1e-5, 100)] = 1.0
    """sampling temperature; above 0, since answers must differ to learn from them"""
    top_k: CountOr0 = 50
    """sample from this many of the likeliest tokens; 0 for all"""
    # Optimization
    init_lr_frac: Fraction = 0.05
    """fraction of the learning rates at the start; they fall linearly to 0"""
    # Evaluation
    eval_every: Every = 60
    """steps between evaluations of pass@k, k up to device_batch_size; -1 for never"""
    eval_examples: Count = 400
    """problems per evaluation"""


def main(config: Config):
    _, rank, _, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)

    B, examples, samples = config.device_batch_size, config.examples_per_step, config.num_samples
    if examples % world_size:
        raise UserError(f"examples_per_step must be a multiple of the {world_size} processes, got {examples}")
    model, tokenizer, parent, networks = parent_model(config.source, device, config.model_tag, config.step)
    train_set, val_set = rl_tasks(config.tasks)
    num_iterations = passes(len(train_set), config.num_iterations, config.num_epochs, examples)

    def rate(step, total):
        return config.init_lr_frac * (1 - step / total)

    training = Training(
        *("rl", parent["model_tag"], config, model, tokenizer, device, num_iterations, rate),
        parent=parent,
        carried=networks,  # MegaContext's networks are saved unchanged
    )
    if training.finished:
        return
    model = training.model
    engine = Engine(model, tokenizer)
    pad_id = tokenizer.encode_special("<|assistant_end|>")
    training.describe(dtype, **{"Problems": len(train_set), "Iterations": num_iterations})

    @torch.no_grad()
    def answers_to(task, conversation, count, seed):
        """[(ids, mask, reward)] of `count` sampled answers, the prompt with mask 0 before each."""
        prompt = tokenizer.render_for_completion(conversation)
        answers = []
        for start in range(0, count, B):
            rows, masks = engine.generate_batch(
                prompt,
                min(B, count - start),
                keep_end=True,  # the end token is learned too
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_k=config.top_k,
                seed=seed * count + start,
            )
            for ids, mask in zip(rows, masks, strict=True):
                reward = task.reward(conversation, tokenizer.decode(ids[len(prompt) :]))
                answers.append((ids, mask, reward))
        return answers

    def summed(*values):
        """The sums over ranks of these numbers, in one go."""
        return sum_over_ranks(torch.tensor(values, dtype=sum_dtype(device), device=device)).tolist()

    def evaluate():
        """pass@k for k = 1 … device_batch_size on held-out problems."""
        model.eval()
        total = min(config.eval_examples, len(val_set))
        right = []
        with autocast(device, dtype):
            for i in range(rank, total, world_size):
                right.append(sum(reward == 1 for *_, reward in answers_to(val_set, val_set[i], B, i)))
        model.train()
        passed = summed(*(sum(pass_at_k(B, c, k) for c in right) for k in range(1, B + 1)))
        return {k: value / total for k, value in enumerate(passed, 1)}

    passed = {int(k): value for k, value in training.meta.get("pass_at_k", {}).items()}
    training.notes["pass_at_k"] = passed
    say = training.progress.say
    while True:
        step = training.step
        last = step == num_iterations
        with training.evaluating(last):
            if training.due(config.eval_every, last):
                passed = training.notes["pass_at_k"] = evaluate()
                shown = [f"pass@{k} {value:.4f}" for k, value in passed.items() if k.bit_count() == 1]  # 1, 2, 4, 8, …
                say(f"step {step:,} | {', '.join(shown)}")
                training.record({f"pass@{k}": value for k, value in passed.items()})
        if last:
            break

        training.begin_step()
        rows, advantages, rewards = [], [], []
        model.eval()
        with autocast(device, dtype):
            for i in range(step * examples + rank, (step + 1) * examples, world_size):
                answers = answers_to(train_set, train_set[i % len(train_set)], samples, i)
                mean = sum(reward for *_, reward in answers) / samples
                for ids, mask, reward in answers:
                    rows.append((ids, mask))
                    advantages.append(reward - mean)
                    rewards.append(reward)
        model.train()
        tokens, reward = summed(sum(sum(mask) for _, mask in rows), sum(rewards))
        loss, read = torch.zeros((), device=device), 0
        for start in range(0, len(rows), B):
            x, y = pad_rows(rows[start : start + B], pad_id, device)
            advantage = torch.tensor(advantages[start : start + B], device=device)
            if not advantage.any():  # all right or all wrong: nothing to learn
                continue
            with autocast(device, dtype):
                nll = model(x, y, loss_reduction="none").view_as(y)
            part = (nll * advantage[:, None]).sum() / tokens * world_size  # gradients are averaged over ranks
            part.backward()
            read += x.numel()
            loss += part.detach()
        lrm = rate(step, num_iterations)
        training.optimize(lrm)
        training.end_step(loss, round(tokens), summed(read)[0] / tokens)  # without the work of sampling
        reward, length = reward / (examples * samples), tokens / (examples * samples)
        training.show(f"reward {reward:.4f}", f"{length:.1f} tokens per answer")
        metrics = {"train/reward": reward, "train/answer_tokens": length, "train/lrm": lrm, **training.speed()}
        training.record(metrics)

    results = {f"pass@{k}": value for k, value in passed.items()}
    training.close("Chat RL", results)


if __name__ == "__main__":
    run(main, Config)
