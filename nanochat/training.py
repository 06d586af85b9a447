"""
The common part of all training stages: model and optimizers, resuming, checkpoints, totals for the comparison of runs,
log, progress line.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import asdict

import torch
import torch.distributed as dist

from nanochat import checkpoint_manager
from nanochat.common import UserError, autocast, get_dist_info, peak_flops, print0, sum_over_ranks
from nanochat.loop import ProgressLine, RunLog, maybe_compile
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import format_duration, get_report
from nanochat.sharding import clip_gradients

# Options that do not influence the result, up to rounding: logging, device, precision and micro-batches; and the model
# to start from (recorded as "parent")
WATCHING = {
    *("run", "resume", "save_every", "eval_every", "eval_tokens", "eval_steps", "eval_examples", "sample_every"),
    *("core_metric_every", "core_metric_max_per_task", "eval_metrics_every", "eval_metrics_max_problems"),
    *("source", "model_tag", "step", "hf_path", "device_type", "dtype", "compile", "keep_last"),
    *("device_batch_size", "streams"),
}
WARM_UP = 10  # the first steps, which also compile, are not part of the training time
# Options for how long to train
HORIZON = {"num_iterations", "target_minutes", "target_flops", "target_param_data_ratio", "num_epochs"}


def _flat(options: dict) -> dict:
    """The options as one flat dict, with MegaContext's if it is on, and "mc": whether it is."""
    options = dict(options)
    if "megacontext" in options:
        group = options.pop("megacontext")
        options.setdefault("mc", group is not None)  # mc_train has no flag, and no group meant no flag once
        options |= group if options["mc"] else {}
    return options


def decisive(config, **others) -> dict:
    """The settings that influence the result; a checkpoint with other values is not resumed."""
    return {key: value for key, value in _flat(asdict(config)).items() if key not in WATCHING} | others


def resume_step(folder, config, settings: dict, total=None, schedule=None) -> int | None:
    """
    The step to resume from, or None to start at the beginning.

    Earlier checkpoints are moved aside, not overwritten, if config.resume is False or if they lack what an exact resume
    needs, as those of nanochat do. Raises UserError for a checkpoint made with other settings, see `decisive`; options
    unknown to it had their defaults. Another length of the run is accepted if `schedule`, see Training, gives all steps
    until now the same learning rates.
    """
    step = checkpoint_manager.find_last_step(folder, print0)
    if step is None:
        return None
    resumable = checkpoint_manager.has_optimizer_state(folder, step)
    if not config.resume or not resumable:
        if dist.is_initialized():
            dist.barrier()  # all ranks must have read it before the first one moves it
        if get_dist_info()[1] == 0:
            why = "" if resumable else f"step {step} has no optimizer state to resume from exactly; "
            print0(f"{why}starting again; the earlier checkpoints are now in {checkpoint_manager.set_aside(folder)}")
        return None
    meta = checkpoint_manager.load_meta(folder, step)
    then = _flat(meta.get("decisive", meta.get("user_config", {})))
    usual = type(config)()
    if hasattr(usual, "megacontext"):  # what a script takes for an option of it may be newer than the checkpoint
        usual.megacontext = type(usual.megacontext).saved({})
    usual = _flat(asdict(usual) | {"mc": True}) | {"mc": getattr(usual, "mc", True)}
    then = {key: then.get(key, usual.get(key, value)) for key, value in settings.items()}
    differ = [key for key, value in settings.items() if then[key] != value]
    hint = "choose another --model_tag, or start again with --resume=0 (the old one is then moved aside)"
    total_then = meta.get("total") or then["num_iterations"]
    if HORIZON.intersection(differ) and total and total_then > 0:

        def first_difference(steps):
            """The first of these steps whose learning rate differs in a run of this length; None if none does."""
            return next((t for t in range(steps) if t >= total or schedule(t, total) != schedule(t, total_then)), None)

        if first_difference(step) is not None:
            same = [s for s in checkpoint_manager.complete_steps(folder) if first_difference(s) is None]
            remedy = f"delete the files after step {same[0]} to resume from there" if same else "keep to that length"
            raise UserError(
                f"{folder} holds step {step} of a run of {total_then:,} steps, and a run of {total:,} steps has "
                f"other learning rates from step {first_difference(step)} on: {remedy}, {hint}"
            )
        differ = [key for key in differ if key not in HORIZON]
    if differ:
        pairs = ", ".join(f"{key}={then[key]!r} (now {settings[key]!r})" for key in differ)
        raise UserError(f"{folder} holds a checkpoint made with {pairs}. Use the same options to resume it, {hint}")
    return step


class Training:
    """
    A training run of a model: optimizers, resuming, checkpoints, logging.

    stage: "base", "mid", "sft", "rl", or "hf" for a model whose weights are not saved; tag: the folder of its
    checkpoints. config: the script's TrainingOptions and, unless frozen, OptimizerOptions. model: that of step 0, on
    `device`, or on the meta device to be initialized. total: total number of steps, or None if it is not known yet.
    schedule(step, total): multiplier of the learning rates. parent: facts that identify the model it starts from.
    companion: networks on `device` that are trained with the model and saved beside it: a module with
    setup_optimizers(). frozen: train only the companion. carried: (state dict, settings) of networks that are saved
    beside the model unchanged.

    step: steps taken. meta, loader_state: of the checkpoint that it resumes from, {} and None at the beginning.
    finished: nothing is left to do (the model is then not loaded). notes: added to the metadata of checkpoints, such as
    the last validation loss. facts: of the run, for the report. batches: a loader whose state_dict() is saved as
    loader_state, or None.
    """

    def __init__(
        self,
        stage,
        tag,
        config,
        model,
        tokenizer,
        device,
        total=None,
        schedule=None,
        *,
        parent=None,
        companion=None,
        frozen=False,
        carried=None,
    ):
        self.stage, self.tag, self.config, self.device, self.total = stage, tag, config, device, total
        self.settings = decisive(config) if parent is None else decisive(config, parent=parent)
        self.folder = checkpoint_manager.model_folder(stage, tag)
        self.resumed_at = resume_step(self.folder, config, self.settings, total, schedule)
        self.step = self.resumed_at or 0
        self.saved_at, self.evaluated = self.resumed_at, False
        self.companion, self.batches = companion, None
        self.meta, self.notes, self.facts, self.validation = {}, {}, {}, {}
        self.loader_state = optimizer_data = None
        if self.resumed_at is not None:
            self.meta = checkpoint_manager.load_meta(self.folder, self.step)
            checkpoint_manager.check_tokenizer(self.folder, self.meta, tokenizer)
            self.evaluated = self.meta.get("evaluated", True)
            self.notes |= {key: self.meta[key] for key in ("val_bpb", "min_val_bpb") if key in self.meta}
        self.finished = self.evaluated and (self.step == total if total else self.meta.get("finished", False))
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
            self.model = model
            if model_data is not None:
                self.model = checkpoint_manager.build_model(model_data, self.meta["model_config"], device)
            self.loader_state = state["loader"]
            if companion is not None:
                companion.load_state_dict(checkpoint_manager.load_companion(self.folder, self.step, device))
        self.model.train()
        maybe_compile(self.model, config.compile, device)
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
        if get_dist_info()[1] == 0:  # weights, and at least as much for the optimizers
            saved = self.model if self._saves_model else companion
            checkpoint_manager.check_room(self.folder, 2 * sum(p.nbytes for p in saved.parameters()))
        self.flops_per_token = self.model.flops_per_token()
        self.peak_flops = peak_flops(device)
        self.total_time = self.meta.get("total_training_time", 0.0)
        self.total_tokens = self.meta.get("total_training_tokens", 0)
        self.total_flops = self.meta.get("total_training_flops", 0)
        self.smooth_loss = self.meta.get("smooth_loss", 0.0)
        self.loss = self.tokens_per_second = self.mfu = None  # of the last step; the loss is smoothed
        self.started = None
        resumed, wandb_id = self.resumed_at is not None, self.meta.get("wandb_id")
        self.log = RunLog(stage, tag, config.run, asdict(config), resumed, wandb_id)
        self.progress = ProgressLine(stage, total, self.step)
        self.carried, settings = carried or (None, None)
        if settings:
            self.notes["megacontext"] = settings
        if parent is not None:
            self.notes["parent"] = parent
        self.notes["tokenizer"] = tokenizer.checksum()
        if self.resumed_at is not None:
            checkpoint_manager.set_rng_state(state["rng"])

    def describe(self, dtype, **facts):
        """Print facts of the run at its start, one per line, and keep them for the report."""
        if parent := self.notes.get("parent"):
            facts = {"Parent": f"{parent['source']} {parent['model_tag']}, step {parent['step']}", **facts}
        precision = str(dtype).removeprefix("torch.")
        self.facts = {**facts, "Processes": get_dist_info()[3], "Precision": precision}
        for name, value in self.facts.items():
            print0(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")

    @property
    def _saves_model(self) -> bool:
        return self.stage in checkpoint_manager.SOURCES

    def due(self, every, last) -> bool:
        """Whether an action for every `every` steps and the last one is due, and was not done before a resume."""
        return every > 0 and not self.evaluated and (last or self.step % every == 0)

    @contextmanager
    def evaluating(self, last):
        """
        Context for all measurements and samples between two steps. A due checkpoint is written first; what they add to
        `notes` is then added to its metadata.

        If one of them fails, the step is saved, if there is a single process. A UserError or a lack of memory ends the
        run with a message on how to resume.
        """
        every = self.config.save_every
        if self.step not in (0, self.saved_at) and (last or (every > 0 and self.step % every == 0)):
            self.save(last)
        try:
            yield
        except Exception as error:
            self.stop_watching()
            if self.step not in (0, self.saved_at) and get_dist_info()[3] == 1:
                self.save(last)
            if not isinstance(error, UserError | torch.OutOfMemoryError):
                raise
            start = "the beginning" if self.saved_at is None else f"step {self.saved_at}"
            where = f"in the evaluation of step {self.step}; the same command resumes from {start} in {self.folder}"
            raise UserError(f"{error} ({where})") from error
        self.evaluated = True
        if self.step == self.saved_at:
            checkpoint_manager.amend_meta(self.folder, self.step, **self.notes, evaluated=True)

    def validated(self, figures: dict):
        """Show and log the figures of a validation, "val/bpb" at least, and keep them for checkpoints and report."""
        bpb = figures["val/bpb"]
        self.validation = {name: value for name, value in figures.items() if name != "val/bpb"}
        self.notes |= {"val_bpb": bpb, "min_val_bpb": min(bpb, self.notes.get("min_val_bpb", math.inf))}
        others = "".join(f" | {name} {v:.4f}" for name, v in self.validation.items() if v is not None)
        self.progress.say(f"step {self.step:,} | validation bpb {bpb:.4f}{others}")
        self.record(figures)

    def set_total(self, steps):
        """Set the total number of steps, if it was not known at the beginning."""
        self.total = self.progress.total = steps

    def totals(self) -> dict:
        """Totals so far, the axes for comparing runs: steps, FLOPs, seconds and tokens."""
        return {
            "step": self.step,
            "total_training_flops": self.total_flops,
            "total_training_time": self.total_time,
            "total_training_tokens": self.total_tokens,
        }

    def save(self, last):
        """Write a checkpoint of the current step, unless its weights are not finite: that is a UserError."""
        trained = [self.model] if self.companion is None else [self.model, self.companion]
        finite = [p.isfinite().all() for module in trained for p in module.parameters()]
        if not torch.stack(finite).all():
            raise self.diverged("the weights are not finite")
        meta = {
            **self.notes,
            **self.totals(),
            "total": self.total,
            "finished": last,
            "evaluated": False,
            "smooth_loss": self.smooth_loss,
            "wandb_id": self.log.wandb_id,
            "model_config": asdict(self.model.config),
            "user_config": asdict(self.config),
            "decisive": self.settings,
        }
        checkpoint_manager.save_checkpoint(
            self.folder,
            self.step,
            self.model.state_dict() if self._saves_model else None,
            [optimizer.state_dict() for optimizer in self.optimizers],
            meta,
            None if self.batches is None else self.batches.state_dict(),
            self.carried if self.companion is None else self.companion.state_dict(),
        )
        self.saved_at = self.step
        if self.config.keep_last > 0 and get_dist_info()[1] == 0:
            checkpoint_manager.prune(self.folder, self.config.keep_last)

    def diverged(self, what) -> UserError:
        """The error to raise when numbers are no longer finite."""
        self.stop_watching()
        last = checkpoint_manager.find_last_step(self.folder)
        good = "no checkpoint was written before" if last is None else f"the last good checkpoint is step {last}"
        return UserError(
            f"{what} at step {self.step}, which is not saved; {good} in {self.folder}. Start again with lower learning "
            "rates (--resume=0, or another --model_tag), or resume from there with --dtype=fp32"
        )

    def optimize(self, lr_multiplier, momentum=0.95, grad_clip=0.0):
        """Take a step down the gradients; momentum: Muon's. Returns their global norm before clipping; None without."""
        for parameter in self.parameters:  # the optimizers of every rank need all of them
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = clip_gradients(self.optimizers, grad_clip)
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
            x, y, *origins = next(batches)
            rows = objective.rows_at_once(len(x))
            passes = count * len(x) // rows
            for j, (x_j, y_j, *origins_j) in enumerate(zip(*(t.split(rows) for t in (x, y, *origins)), strict=True)):
                seed = ((self.step * count + i) * world_size + rank) * (len(x) // rows) + j
                with autocast(self.device, dtype):
                    part, figures = objective(x_j, y_j, progress, seed, *origins_j)
                metrics |= figures
                if part.requires_grad:  # a part may have nothing to learn from
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
            raise self.diverged(f"the loss became {loss}")
        self.step, self.evaluated = self.step + 1, False
        self.total_tokens += tokens
        self.total_flops += tokens * self.flops_per_token * work
        self.seconds = seconds
        if self.step > WARM_UP:
            self.total_time += seconds
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
        bpb = [f"bpb {self.notes['val_bpb']:.4f}"] if "val_bpb" in self.notes else []
        figures = [f"loss {self.loss:.4f}", *bpb, *figures, f"{self.tokens_per_second:,.0f} tok/s"]
        if self.mfu is not None:
            figures.append(f"MFU {100 * self.mfu:.1f}%")
        self.progress.update(self.step, " | ".join(figures), done)

    def stop_watching(self):
        """End log and progress line. May be called again."""
        self.progress.close()
        self.log.finish()

    def close(self, section, results: dict):
        """End log and progress line, and write the section of the report: what was measured, then the settings."""
        self.stop_watching()
        print0(f"trained {self.step:,} steps in {format_duration(self.total_time)}; checkpoint in {self.folder}")
        cuda = self.device.type == "cuda"
        if "val_bpb" in self.notes:
            bpb = {"Validation bpb": self.notes["val_bpb"], "Minimum validation bpb": self.notes["min_val_bpb"]}
            results = {**bpb, **self.validation, **results}
        results = {
            **results,
            "Final training loss": self.loss,
            "Training tokens": self.total_tokens,
            "MFU %": None if self.mfu is None else 100 * self.mfu,
            "Total training FLOPs": f"{self.total_flops:.3e}",
            "Total training time": format_duration(self.total_time),
            "Peak memory (MiB)": torch.cuda.max_memory_allocated(self.device) / 2**20 if cuda else None,
        }
        get_report().log(section, [results, self.facts, "### Settings", _flat(asdict(self.config))])


class PlainObjective:
    """
    The objective without --mc: the model's own loss. With --mc, MCObjective takes its place, with the same methods.

    keeper: see MicroBatches; with one, its origins are the last argument of a call.
    """

    keeper = None

    def __init__(self, model):
        self.model = model

    def __call__(self, x, y, progress, seed):
        """(loss, metrics for the log) of a micro-batch. progress: completed fraction of training; seed: random seed."""
        return self.model(x, y), {}

    def rows_at_once(self, B) -> int:
        """How many of a micro-batch's B rows go through the model at once; a divisor of B."""
        return B

    def work(self, progress, T) -> float:
        return 1.0

    def validate(self, batches, steps, token_bytes) -> dict:
        """Figures for the log, "val/bpb" at least. batches: of which `steps` are read; token_bytes: of each token."""
        return {"val/bpb": evaluate_bpb(self.model, batches, steps, token_bytes)}


def set_length(model, max_seq_len) -> int:
    """The context length T to train with: max_seq_len, or the model's own for -1. The model's config has it then."""
    T = model.config.sequence_len if max_seq_len == -1 else max_seq_len
    if model.max_seq_len < T:
        raise UserError(f"max_seq_len must be at most the model's {model.max_seq_len} positions, got {T}")
    model.config.sequence_len = T
    return T


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
