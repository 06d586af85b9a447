"""
Supervised finetuning: one conversation per row, with the loss on the assistant's tokens only.

    python -m scripts.chat_sft
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
    python -m scripts.chat_sft --tasks=local --device_batch_size=32

Run the same command again to resume an interrupted run from its newest checkpoint.
"""

from dataclasses import dataclass

import torch

from nanochat.common import UserError, autocast, compute_init, resolve_dtype, sum_over_ranks
from nanochat.configurator import run
from nanochat.conversations import padded_batches
from nanochat.loop import passes
from nanochat.options import FinetuningOptions
from nanochat.ranges import Count, Every, Fraction
from nanochat.training import Training, parent_model
from tasks.mixtures import Tasks, eval_tasks, sft_mixture, sft_val
from tasks.scoring import evaluate

METRICS = {
    "full": ["MMLU", "ARC-Easy"],
    "local": ["Arithmetic"],
    "recall": ["Recall"],
    "memory": ["Arithmetic", "SpellingBee", "Recall"],
}  # tasks for the evaluations during training


@dataclass
class Config(FinetuningOptions):
    # What to train
    tasks: Tasks = "full"
    """full (datasets of the hub), local (generated, for a CPU), recall (generated, up to 6,000 characters) or memory
    (local, and recall in up to 2,000 characters)"""
    source: str = "mid"
    """stage of the checkpoint to start from: base, mid, sft or rl"""
    # Optimization
    device_batch_size: Count = 4
    """conversations per process in a micro-batch"""
    target_examples_per_step: Count = 32
    """conversations per step over all processes, reached by gradient accumulation"""
    init_lr_frac: Fraction = 0.02
    """fraction of the learning rates at the start; they fall linearly to 0"""
    # Evaluation
    eval_every: Every = 100
    """steps between validations; -1 for never"""
    eval_steps: Count = 100
    """micro-batches per validation, on each process"""
    eval_metrics_every: Every = 200
    """steps between evaluations on tasks; -1 for never"""
    eval_metrics_max_problems: Count = 1024
    """problems per task"""


def main(config: Config):
    _, rank, _, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)

    B, examples = config.device_batch_size, config.target_examples_per_step
    if examples % world_size:
        raise UserError(f"target_examples_per_step must be a multiple of the {world_size} processes, got {examples}")
    model, tokenizer, parent, networks = parent_model(config.source, device, config.model_tag, config.step)
    T = model.config.sequence_len
    train_set, val_set = sft_mixture(config.tasks), sft_val(config.tasks)
    metric_tasks = {}
    if config.eval_metrics_every > 0:
        metric_tasks = {name: eval_tasks(config.tasks)[name]() for name in METRICS[config.tasks]}
    num_iterations = passes(len(train_set), config.num_iterations, config.num_epochs, examples)

    def rate(step, total):
        return config.init_lr_frac * (1 - step / total)

    training = Training(
        *("sft", parent["model_tag"], config, model, tokenizer, device, num_iterations, rate),
        parent=parent,
        carried=networks,  # MegaContext's networks are saved unchanged
    )
    if training.finished:
        return
    model = training.model
    training.describe(dtype, **{"Conversations": len(train_set), "Iterations": num_iterations})

    def batches_of(conversations, indices):
        """This rank's rows of these conversations."""
        own = [conversations[i % len(conversations)] for i in indices[rank::world_size]]
        return padded_batches(own, tokenizer, B, T, device)

    def loss_of(batches):
        """(sum of the losses over this rank's targets, a tensor; number of targets)."""
        with autocast(device, dtype):
            losses = [model(x, y, loss_reduction="sum") for x, y in batches]
        return torch.stack(losses).sum(), sum((y >= 0).sum() for _, y in batches)

    @torch.no_grad()
    def validate():
        indices = range(min(len(val_set), config.eval_steps * B * world_size))
        nats, count = torch.zeros((), device=device), torch.zeros((), device=device)
        for start in range(0, len(indices), B * world_size):
            batch = batches_of(val_set, indices[start : start + B * world_size])
            if batch:
                loss, tokens = loss_of(batch)
                nats, count = nats + loss, count + tokens
        nats, count = sum_over_ranks(torch.stack((nats, count)))
        return (nats / count.clamp(min=1)).item()

    val_loss, metrics = training.meta.get("val_loss"), training.meta.get("metrics", {})
    training.notes |= {"val_loss": val_loss, "metrics": metrics}
    say = training.progress.say
    while True:
        step = training.step
        last = step == num_iterations
        with training.evaluating(last):
            if training.due(config.eval_every, last):
                val_loss = training.notes["val_loss"] = validate()
                say(f"step {step:,} | validation loss {val_loss:.4f}")
                training.record({"val/loss": val_loss})
            if step > 0 and training.due(config.eval_metrics_every, last):
                model.eval()
                with autocast(device, dtype):
                    for name, task in metric_tasks.items():
                        score = evaluate(task, model, tokenizer, config.eval_metrics_max_problems, max_new_tokens=256)
                        metrics[name] = score.accuracy
                model.train()
                say(f"step {step:,} | " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
                training.record({f"metrics/{name}": value for name, value in metrics.items()})
        if last:
            break

        # The mean is over the tokens of the whole step, so that it is the same however rows are shared out
        training.begin_step()
        batches = batches_of(train_set, range(step * examples, (step + 1) * examples))
        counts = [torch.stack(((y >= 0).sum(), torch.tensor(y.numel(), device=device))) for _, y in batches]
        counts = sum_over_ranks(sum(counts)).clamp(min=1)  # targets, and what is read, padding too
        loss = torch.zeros((), device=device)
        for batch in batches:
            part = loss_of([batch])[0] / counts[0] * world_size  # ranks are averaged
            part.backward()
            loss += part.detach()
        lrm = rate(step, num_iterations)
        training.optimize(lrm)
        targets, read = counts.tolist()
        loss = training.end_step(loss, targets, read / targets)
        training.show(f"validation {val_loss:.4f}" if val_loss else "validation -")
        training.record({"train/loss": loss, "train/lrm": lrm, **training.speed()})

    results = {"Validation loss": val_loss, **metrics}
    training.close("Chat SFT", results)


if __name__ == "__main__":
    run(main, Config)
