"""
The common part of all training stages: model and optimizers, resuming, checkpoints, totals for the comparison of runs,
log, progress line.
"""

import math
import time
from dataclasses import asdict

import torch
import torch.distributed as dist

from nanochat import checkpoint_manager
from nanochat.common import UserError, autocast, get_dist_info, peak_flops, print0, sum_over_ranks
from nanochat.loop import ProgressLine, RunLog, clock, maybe_compile
from nanochat.sharding import clip_gradients

# Options that say how to watch a run, or which model to start from (recorded as "parent"). All others influence the
# result
WATCHING = {
    *("run", "resume", "save_every", "eval_every", "eval_tokens", "eval_steps", "eval_examples", "sample_every"),
    *("core_metric_every", "core_metric_max_per_task", "eval_metrics_every", "eval_metrics_max_problems"),
    *("source", "model_tag", "step", "device_type", "compile", "keep_last"),
}


def decisive(config, **others) -> dict:
    """The settings that influence the result; a checkpoint made with others is not resumed."""
    settings = {key: value for key, value in asdict(config).items() if key not in WATCHING}
    if not settings.pop("mc", True):  # then its options have no effect
        settings["megacontext"] = None
    return {**settings, **others}


def resume_step(folder, resume: bool, settings: dict) -> int | None:
    """
    The step to resume from, or None to start at the beginning.

    A checkpoint made with other settings (see `decisive`) is a UserError, unless resume is False; then it is
    moved aside, not overwritten.
    """
    _, rank, _, _ = get_dist_info()
    step = checkpoint_manager.find_last_step(folder)
    if step is None:
        return None
    if not resume:
        if dist.is_initialized():
            dist.barrier()  # all ranks must have read it before the first one moves it
        if rank == 0:
            print0(f"starting again; the earlier checkpoints are now in {checkpoint_manager.set_aside(folder)}")
        return None
    meta = checkpoint_manager.load_meta(folder, step)
    then = meta.get("decisive") or meta.get("user_config", {})
    differ = [key for key, value in settings.items() if then.get(key) != value]
    if differ:
        pairs = ", ".join(f"{key}={then.get(key)!r} (now {settings[key]!r})" for key in differ)
        raise UserError(
            f"{folder} holds a checkpoint made with {pairs}. Use the same options to resume it, choose "
            "another --model_tag, or start again with --resume=0 (the old one is then moved aside)"
        )
    return step


class Training:
    """
    A model under training.

    stage: "base", "mid", "sft" or "rl"; tag: the folder of its checkpoints. config: the script's TrainingOptions and,
    unless frozen, OptimizerOptions. settings: `decisive` of them. model: that of step 0, on `device`, or on the meta
    device to be initialized. total: steps to come, or None when they are not known beforehand. companion: networks on
    `device` that are trained with the model and kept beside it: a module with setup_optimizers(). frozen: train the
    companion alone.

    step: steps taken. meta, loader_state: from the resumed checkpoint, {} and None at the beginning.
    finished: whether nothing is left to do (the model is then not loaded).
    """

    def __init__(self, stage, tag, config, settings, model, device, total=None, companion=None, frozen=False):
        self.stage, self.tag, self.config, self.settings, self.device = stage, tag, config, settings, device
        self.folder = checkpoint_manager.checkpoint_root(stage) / tag
        self.resumed_at = resume_step(self.folder, config.resume, settings)
        self.step = self.resumed_at or 0
        self.companion = companion
        self.carried_meta = {}
        self.carried = None  # state dict of networks that are saved unchanged, see `carry`
        self.meta, self.loader_state, optimizer_data = {}, None, None
        if self.resumed_at is not None:
            self.meta = checkpoint_manager.load_meta(self.folder, self.step)
        self.finished = self.meta.get("finished", self.step == total)
        if self.finished:
            print0(f"{self.folder} is already trained to step {self.step}: nothing to do (--resume=0 trains it again)")
            return
        if self.resumed_at is None:
            self.model = model
            if model.get_device().type == "meta":
                model.to_empty(device=device)
                model.init_weights()
        else:
            print0(f"resuming from step {self.step} in {self.folder}")
            loaded = checkpoint_manager.load_checkpoint(self.folder, self.step, device, load_optimizer=True)
            model_data, optimizer_data, _, state = loaded
            self.model = checkpoint_manager.build_model(model_data, self.meta["model_config"], device)
            self.loader_state = state["loader"]
            if companion is not None:
                companion.load_state_dict(checkpoint_manager.load_companion(self.folder, self.step, device))
        self.model.train()
        self.compiled = maybe_compile(self.model, config.compile, device)
        self.optimizers = [] if companion is None else companion.setup_optimizers()
        if frozen:  # its training mode makes no difference: there is no dropout
            self.model.requires_grad_(False)
        else:
            self.optimizers += self.model.setup_optimizers(
                config.unembedding_lr, config.embedding_lr, config.matrix_lr, config.weight_decay
            )
        self.parameters = [p for o in self.optimizers for group in o.param_groups for p in group["params"]]
        for optimizer, data in zip(self.optimizers, optimizer_data or [], strict=optimizer_data is not None):
            optimizer.load_state_dict(data)
        self.flops_per_token = self.model.flops_per_token()
        self.peak_flops = peak_flops(device)
        self.total_time = self.meta.get("total_training_time", 0.0)
        self.total_tokens = self.meta.get("total_training_tokens", 0)
        self.total_flops = self.meta.get("total_training_flops", 0)
        self.smooth_loss = self.meta.get("smooth_loss", 0.0)
        self.loss = self.tokens_per_second = self.mfu = None  # of the last step; the loss is smoothed
        self.started = None
        self.log = RunLog(
            f"{stage}_{tag}", config.run, asdict(config), self.resumed_at is not None, self.meta.get("wandb_id")
        )
        self.progress = ProgressLine(stage, total, self.step)
        if self.resumed_at is not None:
            checkpoint_manager.set_rng_state(state["rng"])

    def carry(self, companion_data, **meta):
        """Save these networks beside the model, unchanged, and say so in the meta data."""
        self.carried, self.carried_meta = companion_data, meta

    def due(self, every, last) -> bool:
        """Whether an action for every `every` steps and the last one is due, and was not done before a resume."""
        return every > 0 and self.step != self.resumed_at and (last or self.step % every == 0)

    def totals(self) -> dict:
        """Step, FLOPs, seconds and tokens so far: the axes for comparing runs."""
        return {
            "step": self.step,
            "total_training_flops": self.total_flops,
            "total_training_time": self.total_time,
            "total_training_tokens": self.total_tokens,
        }

    def save(self, finished, loader_state=None, **facts):
        """Write a checkpoint of the current step. facts: added to the meta data."""
        checkpoint_manager.save_checkpoint(
            self.folder,
            self.step,
            self.model.state_dict(),
            [optimizer.state_dict() for optimizer in self.optimizers],
            {
                **self.totals(),
                **self.carried_meta,
                **facts,
                "finished": finished,
                "smooth_loss": self.smooth_loss,
                "wandb_id": self.log.wandb_id,
                "model_config": asdict(self.model.config),
                "user_config": asdict(self.config),
                "decisive": self.settings,
            },
            loader_state,
            self.carried if self.companion is None else self.companion.state_dict(),
        )
        if self.config.keep_last > 0 and get_dist_info()[1] == 0:
            checkpoint_manager.prune(self.folder, self.config.keep_last)

    def optimize(self, lr_multiplier, momentum, grad_clip=0.0):
        """Take a step down the gradients. Returns their global norm before clipping; None without clipping."""
        for parameter in self.parameters:  # the optimizers of every rank need all of them
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = clip_gradients(self.optimizers, grad_clip) if grad_clip > 0 else None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lr_multiplier
                if "momentum" in group:  # Muon
                    group["momentum"] = momentum
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None
        return norm

    def record(self, figures: dict):
        """Log figures of the current step: numbers, None, or what `float` makes a number of, such as a tensor."""
        figures = {n: f if f is None or isinstance(f, int | float) else float(f) for n, f in figures.items()}
        self.log.log({**self.totals(), **figures})

    def begin_step(self):
        self.started = time.time()

    def accumulate(self, objective, batches, count, progress, dtype):
        """
        Add up the gradients of the next `count` micro-batches, each by its share of the mean loss.

        objective: see PlainObjective; it runs in `dtype`. progress: part of training that is done. Returns (mean loss,
        a tensor; the newest of each figure for the log).
        """
        _, rank, _, world_size = get_dist_info()
        loss, metrics = torch.zeros((), device=self.device), {}
        for i in range(count):
            x, y = next(batches)
            rows = objective.rows_at_once(len(x))
            passes = count * len(x) // rows
            for j, (x_j, y_j) in enumerate(zip(x.split(rows), y.split(rows), strict=True)):
                seed = ((self.step * count + i) * world_size + rank) * (len(x) // rows) + j
                with autocast(self.device, dtype):
                    part, figures = objective(x_j, y_j, progress, seed)
                metrics |= figures
                (part / passes).backward()
                loss += part.detach() / passes
        return loss, metrics

    def end_step(self, loss, tokens, work=1.0) -> float:
        """
        Count a step. loss: this rank's mean, a tensor; tokens: of all ranks; work: FLOPs spent, as a multiple of what
        the model alone needs for them. Returns the mean loss over ranks.

        Raises UserError when the loss is not finite.
        """
        world_size = get_dist_info()[3]
        loss = (sum_over_ranks(loss) / world_size).item()  # waits for the device
        seconds = time.time() - self.started
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {self.step}: start again (--resume=0, or another "
                f"--model_tag) with lower learning rates or --dtype=fp32; earlier checkpoints are in {self.folder}"
            )
        self.step += 1
        self.total_tokens += tokens
        self.total_flops += tokens * self.flops_per_token * work
        self.seconds = seconds
        if self.step > 10:
            self.total_time += seconds  # the first steps compile and warm up
        self.smooth_loss = 0.9 * self.smooth_loss + 0.1 * loss
        self.loss = self.smooth_loss / (1 - 0.9**self.step)
        self.tokens_per_second = tokens / seconds
        if self.peak_flops:
            self.mfu = work * self.flops_per_token * self.tokens_per_second / (self.peak_flops * world_size)
        return loss

    def speed(self) -> dict:
        """Speed of the last step, for the log."""
        return {"train/dt": self.seconds, "train/tok_per_sec": self.tokens_per_second, "train/mfu": self.mfu}

    def show(self, *figures, done=None):
        """Update the progress line. done: completed fraction of the run, if the number of steps is not known."""
        figures = [f"loss {self.loss:.4f}", *figures, f"{self.tokens_per_second:,.0f} tok/s"]
        if self.mfu is not None:
            figures.append(f"MFU {100 * self.mfu:.1f}%")
        self.progress.update(self.step, " | ".join(figures), done)

    def close(self) -> dict:
        """End log and progress line; returns the figures for the report."""
        self.progress.close()
        self.log.finish()
        print0(f"trained {self.step:,} steps in {clock(self.total_time)}; checkpoint in {self.folder}")
        cuda = self.device.type == "cuda"
        return {
            "Final training loss": self.loss,
            "Training tokens": self.total_tokens,
            "MFU %": None if self.mfu is None else 100 * self.mfu,
            "Total training FLOPs": f"{self.total_flops:.3e}",
            "Total training time": clock(self.total_time),
            "Peak memory (MiB)": torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else None,
        }


class PlainObjective:
    """The loss of the model itself; --mc replaces it by another object with these methods."""

    def __init__(self, model):
        self.model = model

    def __call__(self, x, y, progress, seed):
        """(loss, metrics for the log) of a micro-batch. progress: completed fraction of training; seed: random seed."""
        return self.model(x, y), {}

    def rows_at_once(self, B) -> int:
        """Rows of a micro-batch of B that are put through the model together; a divisor of B."""
        return B

    def work(self, progress, T) -> float:
        return 1.0

    def validate(self, batches, steps, token_bytes) -> dict:
        """Further figures for the validation."""
        return {}


def parent_model(source, device, model_tag, step):
    """
    (model, tokenizer, facts, networks) of the checkpoint that a stage starts from.

    facts identify it by its checksum, so that a stage trained from another model is not resumed.
    networks: MegaContext's networks beside the model, as (state dict, meta data "megacontext"); None without them.
    """
    model, tokenizer, meta = checkpoint_manager.load_model(source, device, "train", model_tag, step)
    folder = checkpoint_manager.checkpoint_root(source) / meta["model_tag"]
    facts = {
        "source": source,
        "model_tag": meta["model_tag"],
        "step": meta["step"],
        "weights": checkpoint_manager.weights_checksum(folder, meta["step"]),
    }
    state = checkpoint_manager.load_companion(folder, meta["step"], device)
    return model, tokenizer, facts, None if state is None else (state, meta["megacontext"])
