"""Parts shared by all training loops: batch arithmetic, schedules, logs, progress line."""

import math
import os
import sys
import time

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from nanochat.common import JSONLines, UserError, get_base_dir, get_dist_info, print0
from nanochat.cross_entropy import loss_of_rows
from nanochat.dataloader import TokenLoader
from nanochat.dataset import list_row_groups
from nanochat.report import format_duration


def accumulation_steps(total_batch_size, device_batch_size, max_seq_len, world_size) -> int:
    """Number of micro-batches that each process accumulates for one step of total_batch_size tokens."""
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
    The micro-batches of training. A step has the same tokens for any number of processes.

    Micro-batch i of rank r consists of `streams` streams of B / streams rows each, numbered from
    (i·world_size + r)·streams on, of accumulation·world_size·streams in all. A single stream makes a batch of
    consecutive text; several mix documents, which matters for small batches. If a small corpus has too few row
    groups for that many streams, micro-batches take turns on the same streams.

    piece: see TokenLoader. state: a `state_dict()` to resume from; exactly, if the number of streams is the same.
    Otherwise, as with another B, the text continues after the last row group that was begun; unread parts of earlier
    ones follow in the next epoch.

    keeper: an object with a state per stream, which is saved with the loader's: `save(stream)` returns it as tensors in
    lists or dicts, `load(stream, saved)` restores it. With one, a batch is (x, y, origins), the last
    [B, 2] int64 on the CPU: the number of each row's stream, and 1 for a row that is fresh (see TokenLoader).
    """

    def __init__(self, tokenizer, B, T, device, accumulation, streams=1, state=None, piece=0, keeper=None):
        _, rank, _, world_size = get_dist_info()
        if B % streams:
            raise UserError(f"streams must divide the device_batch_size of {B}, got {streams}")
        turns = accumulation if accumulation * world_size * streams <= len(list_row_groups("train")) else 1
        total = turns * world_size * streams
        numbers = [(i * world_size + rank) * streams + s for i in range(turns) for s in range(streams)]
        states = _states_of(state, numbers, total) if state else None
        self.streams, self.numbers, self.turn, self.keeper = streams, numbers, 0, keeper
        for saved in state or []:
            if keeper and "kept" in saved and saved["world_size"] == total:
                keeper.load(saved["rank"], saved["kept"])
        self.loader = TokenLoader(
            tokenizer, B // streams, T, "train", device, states, ranks=numbers, world_size=total, piece=piece
        )

    def __next__(self):
        parts = []
        for _ in range(self.streams):
            parts.append(next(self.loader))
            if self.keeper:
                fresh = torch.from_numpy(self.loader.fresh).long()
                stream = torch.full_like(fresh, self.numbers[self.turn % len(self.numbers)])
                parts[-1] += (torch.stack((stream, fresh), dim=1),)
            self.turn += 1
        return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def state_dict(self):
        """Call this between steps."""
        states = self.loader.state_dict()
        return [{**state, "kept": self.keeper.save(state["rank"])} for state in states] if self.keeper else states

    def close(self):
        self.loader.close()


def _states_of(states, numbers, total) -> list[dict]:
    """States for the streams with these numbers, of `total`, that continue those that the ranks had before."""
    states = [{name: value for name, value in state.items() if name != "kept"} for state in states]
    if dist.is_initialized():
        of_ranks = [None] * get_dist_info()[3]
        dist.all_gather_object(of_ranks, states)
        states = [state for part in of_ranks for state in part]
    if states[0]["world_size"] == total:
        by_number = {state["rank"]: state for state in states}
        return [by_number[number] for number in numbers]
    epoch, group = max((state["epoch"], state["row_group"]) for state in states)
    print0(
        f"data streams: {total} now, {states[0]['world_size']} before; the text continues with row group {group + 1}"
    )
    count, continued = len(list_row_groups("train")), []
    for number in numbers:
        first = group + 1 + (number - group - 1) % total  # row groups of a stream: number, number + total, …
        state = {"epoch": epoch, "row_group": first} if first < count else {"epoch": epoch + 1, "row_group": number}
        continued.append({**state, "token": 0, "rank": number, "world_size": total})
    return continued


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


def compiles(mode: str, device) -> bool:
    """Whether to compile, by --compile: "on", "off", or "auto", which is on for CUDA."""
    return mode == "on" or (mode == "auto" and device.type == "cuda")


def maybe_compile(model, mode: str, device):
    """
    Compile the blocks and the loss of a model in place, if --compile says so; returns the model.

    Blocks are compiled one by one: the code for one serves all, so a deeper model starts no slower. From the second
    sequence length on, the code serves any length.
    """
    if compiles(mode, device):
        for block in model.transformer.h:
            block.compile()
        model.loss_of_rows = torch.compile(loss_of_rows)
    return model


def passes(examples, num_iterations, num_epochs, per_step) -> int:
    """Steps of `per_step` examples: num_iterations, or with -1 num_epochs passes over all examples."""
    steps = num_iterations if num_iterations > 0 else examples * num_epochs // per_step
    if steps < 1:
        raise UserError(f"{examples} conversations are less than one step of {per_step}")
    return steps


# ---------------------------------------------------------------------------------------------------------
# Logs and progress

WANDB_TIMEOUT = 30  # seconds until a server that does not answer is given up


def open_wandb(project, run, config, wandb_id=None):
    """
    A W&B run; offline, with a warning, if W&B cannot be reached; None if it does not work at all.

    A fault of logging must not end a training, hence `except Exception`.
    """
    import wandb

    options = {"project": project, "name": run, "config": config, "id": wandb_id, "resume": "allow"}
    try:
        return wandb.init(**options, settings=wandb.Settings(init_timeout=WANDB_TIMEOUT))
    except Exception as error:
        print0(f"W&B: {error}\nW&B: the run is kept on this machine; `wandb sync` sends it later")
    try:
        return wandb.init(**options, mode="offline")
    except Exception as error:
        print0(f"W&B: {error}\nW&B: nothing is kept for it")


def check_wandb(run):
    """Raise UserError if a W&B run is requested but W&B cannot be used: to be called before a recipe's first stage."""
    if run == "dummy" or os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    try:
        wandb.Api(timeout=WANDB_TIMEOUT).viewer  # noqa: B018 (asks the server who we are)
    except Exception as error:  # of many kinds, each to be shown
        raise UserError(
            f"W&B cannot be used ({error}): log in with `wandb login`, leave W&B out, or set WANDB_MODE=offline, "
            "which keeps the log on this machine"
        ) from error


class RunLog:
    """
    Metrics by step: always to $NANOCHAT_BASE_DIR/logs/<stage>_<tag>.jsonl, and to W&B unless run is "dummy".

    A log that can no longer be written is reported once and left out: it never ends a training.
    """

    def __init__(self, stage, tag, run, config, resumed, wandb_id=None):
        self.file, self.wandb, self.wandb_id, self._listeners = None, None, wandb_id, []
        if get_dist_info()[1] != 0:
            return
        path = get_base_dir() / "logs" / f"{stage}_{tag}.jsonl"
        try:
            if path.exists() and not resumed:
                path.rename(path.with_name(f"{path.stem}.{time.strftime('%Y%m%d-%H%M%S')}.old"))
            if path.exists():  # a killed run may have left an incomplete line
                whole = path.read_bytes()
                os.truncate(path, whole.rfind(b"\n") + 1)
            self.file = JSONLines(path)
        except OSError as error:
            print0(f"there will be no log {path}: {error.strerror}")
        if run != "dummy":
            self.wandb = open_wandb("nanochat" if stage == "base" else f"nanochat-{stage}", run, config, wandb_id)
        if self.wandb:
            self.wandb_id = self.wandb.id

    def listen(self, listener):
        """From now on also pass each record to an object with metrics(dict) and close()."""
        self._listeners.append(listener)

    def log(self, metrics: dict):
        """A record such as {"step": 1, "train/loss": 2.5}."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        if self.file:
            self.file.write(finite)
        if self.wandb:
            try:
                self.wandb.log(metrics)
            except Exception as error:  # see open_wandb
                print0(f"the log continues without W&B: {error}")
                self.wandb = None
        for listener in self._listeners:
            listener.metrics(metrics)

    def finish(self):
        for listener in self._listeners:
            listener.close()
        if self.file:
            self.file.close()
        if self.wandb:
            try:
                self.wandb.finish()
            except Exception as error:  # see open_wandb
                print0(f"W&B: {error}")


class ProgressLine:
    """
    A progress bar with figures and the time left; without a terminal, a plain line every `every` seconds. unit: name of
    the counted items.
    """

    def __init__(self, stage, total, start=0, every=10.0, unit="step"):
        self.total, self.every, self.unit = total, every, unit
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
        """step: units done. done: completed fraction of the run, if the total is not known."""
        if not self.shown:
            return
        if done is None:
            done = step / self.total if self.total else 0.0
        if self.began is None:  # the clock starts after the first step, which also compiles and warms up
            self.began, self.start = time.time(), done
        left = (
            "?"
            if done <= self.start
            else format_duration((time.time() - self.began) / (done - self.start) * (1 - done))
        )
        count = f"{self.unit} {step:,}" + (f"/{self.total:,}" if self.total else f" ({100 * done:.0f}%)")
        text = f"{count} | {figures} | {left} left"
        if self.bar:
            self.bar.update(self.task, completed=done, text=text)
        elif time.time() - self.last_print >= self.every or done >= 1 or not self.last_print:
            print(text, flush=True)
            self.last_print = time.time()

    def say(self, text):
        """Print a line above the progress line."""
        if self.shown:
            self.bar.console.print(text, highlight=False, markup=False) if self.bar else print(text, flush=True)

    def close(self):
        if self.bar:
            self.bar.stop()
