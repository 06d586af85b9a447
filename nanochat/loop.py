"""Parts shared by all training loops: batch arithmetic, schedules, logs, progress line."""

import json
import math
import os
import sys
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nanochat.common import UserError, get_base_dir, get_dist_info, print0
from nanochat.dataloader import TokenLoader
from nanochat.dataset import list_row_groups


def accumulation_steps(total_batch_size, device_batch_size, max_seq_len, world_size) -> int:
    """Number of micro-batches that each process accumulates for one step of total_batch_size tokens."""
    if device_batch_size < 1 or max_seq_len < 1:
        raise UserError(
            f"device_batch_size and max_seq_len must be at least 1, got {device_batch_size} and {max_seq_len}"
        )
    tokens = device_batch_size * max_seq_len * world_size
    if total_batch_size < tokens or total_batch_size % tokens:
        fits = max(1, round(total_batch_size / tokens)) * tokens
        raise UserError(
            f"total_batch_size must be a multiple of device_batch_size × max_seq_len × processes = "
            f"{device_batch_size} × {max_seq_len} × {world_size} = {tokens:,}, got {total_batch_size:,}; "
            f"--total_batch_size={fits} fits, or choose another --device_batch_size"
        )
    return total_batch_size // tokens


class MicroBatches:
    """
    The micro-batches of training, such that a step has the same tokens for any number of processes.

    Micro-batch i of rank r consists of `streams` streams of B / streams rows each, numbered from
    (i·world_size + r)·streams on, of accumulation·world_size·streams in all. A single stream makes a batch of
    consecutive text; several mix documents, which matters for small batches. If a small corpus has too few row
    groups for that many streams, micro-batches take turns on the same streams.
    """

    def __init__(self, tokenizer, B, T, device, accumulation, streams=1, state=None):
        _, rank, _, world_size = get_dist_info()
        if streams < 1 or B % streams:
            raise UserError(f"streams must divide the device_batch_size of {B}, got {streams}")
        turns = accumulation if accumulation * world_size * streams <= len(list_row_groups("train")) else 1
        states = iter(state or [None] * (turns * streams))
        if state and len(state) != turns * streams:
            raise UserError(
                f"the checkpoint has {len(state)} data streams, this run {turns * streams}: use its batch sizes"
            )

        def loader(i, s):
            share = {"rank": (i * world_size + rank) * streams + s, "world_size": turns * world_size * streams}
            return TokenLoader(tokenizer, B // streams, T, "train", device, next(states), **share)

        self.loaders = [[loader(i, s) for s in range(streams)] for i in range(turns)]
        self.turn = 0

    def __next__(self):
        parts = [next(loader) for loader in self.loaders[self.turn]]
        self.turn = (self.turn + 1) % len(self.loaders)
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def state_dict(self):
        """Call this between steps."""
        return [loader.state_dict() for loaders in self.loaders for loader in loaders]

    def close(self):
        for loaders in self.loaders:
            for loader in loaders:
                loader.close()


def lr_multiplier(step, num_iterations, warmup_ratio=0.0, warmdown_ratio=0.0, final_lr_frac=0.0) -> float:
    """Linear warmup from 0, constant, then a linear decrease to final_lr_frac over the last part."""
    warmup, warmdown = round(warmup_ratio * num_iterations), round(warmdown_ratio * num_iterations)
    if step < warmup:
        return (step + 1) / warmup
    if step <= num_iterations - warmdown:
        return 1.0
    progress = (num_iterations - step) / warmdown
    return progress + (1 - progress) * final_lr_frac


def muon_momentum(step) -> float:
    """0.85 → 0.95 over the first 300 steps."""
    part = min(step / 300, 1.0)
    return (1 - part) * 0.85 + part * 0.95


def described(figures: dict) -> str:
    """Format figures as " | name 0.1234 | …"; those that are None are left out."""
    return "".join(f" | {name} {value:.4f}" for name, value in figures.items() if value is not None)


def maybe_compile(model, mode: str, device):
    """The model compiled (mode "on", or "auto" on CUDA), or as it is."""
    if mode not in ("auto", "on", "off"):
        raise UserError(f"--compile must be auto, on or off, got {mode!r}")
    on = mode == "on" or (mode == "auto" and device.type == "cuda")
    return torch.compile(model, dynamic=False) if on else model


def passes(examples, num_iterations, num_epochs, per_step) -> int:
    """Steps of `per_step` examples: num_iterations if that is positive, else num_epochs passes over all examples."""
    steps = num_iterations if num_iterations > 0 else examples * num_epochs // per_step
    if steps < 1:
        raise UserError(f"{examples} conversations are less than one step of {per_step}")
    return steps


# ---------------------------------------------------------------------------------------------------------
# Logs and progress


def print_facts(facts: dict):
    """Print facts about a run at its start, one per line, on the first process."""
    for name, value in facts.items():
        print0(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")


class RunLog:
    """
    Metrics by step: always to $NANOCHAT_BASE_DIR/logs/<name>.jsonl, and to W&B unless run is "dummy".

    others: objects with metrics(dict) and close() that also receive each record.
    """

    def __init__(self, name, run, config, resumed, wandb_id=None):
        self.file, self.wandb, self.others = None, None, []
        if get_dist_info()[1] != 0:
            return
        path = get_base_dir() / "logs" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not resumed:
            path.rename(path.with_name(f"{path.stem}.{time.strftime('%Y%m%d-%H%M%S')}.old"))
        if path.exists():  # a killed run may have left an incomplete line
            whole = path.read_bytes()
            os.truncate(path, whole.rfind(b"\n") + 1)
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (lives as long as the run)
        if run != "dummy":
            import wandb

            self.wandb = wandb.init(project="nanochat", name=run, config=config, id=wandb_id, resume="allow")

    @property
    def wandb_id(self):
        return self.wandb.id if self.wandb else None

    def log(self, metrics: dict):
        """A record such as {"step": 1, "train/loss": 2.5}."""
        if self.file is None:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        self.file.write(json.dumps(finite) + "\n")
        if self.wandb:
            self.wandb.log(metrics)
        for other in self.others:
            other.metrics(metrics)

    def finish(self):
        for other in self.others:
            other.close()
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def clock(seconds) -> str:
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


class ProgressLine:
    """A progress bar with figures and the time left; without a terminal, a plain line every `every` seconds."""

    def __init__(self, stage, total, start=0, every=10.0):
        self.total, self.every = total, every
        self.began, self.last_print = None, 0.0
        self.shown = get_dist_info()[1] == 0
        self.bar = None
        console = Console(file=sys.stdout)
        if self.shown and console.is_terminal:
            columns = TextColumn(stage), BarColumn(bar_width=20), TextColumn("{task.fields[text]}")
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task(stage, total=1.0, completed=start / total if total else 0.0, text="")
            self.bar.start()

    def update(self, step, figures: str, done: float | None = None):
        """step: steps done. done: completed fraction of the run, if the number of steps is not known."""
        if not self.shown:
            return
        done = step / self.total if done is None else done
        if self.began is None:  # the clock starts after the first step, which also compiles and warms up
            self.began, self.start = time.time(), done
        first = done <= self.start
        left = "?" if first else clock((time.time() - self.began) / (done - self.start) * (1 - done))
        count = f"step {step:,}" + (f"/{self.total:,}" if self.total else f" ({100 * done:.0f}%)")
        text = f"{count} | {figures} | {left} left"
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
        elif time.time() - self.last_print >= self.every or done >= 1 or first:
            print(text, flush=True)
            self.last_print = time.time()

    def say(self, text):
        """Print a line above the progress line."""
        if self.shown:
            self.bar.console.print(text, highlight=False, markup=False) if self.bar else print(text, flush=True)

    def close(self):
        if self.bar:
            self.bar.stop()
