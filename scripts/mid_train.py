"""
Midtraining: teach a base model the format of chats, multiple choice, and the use of tools.

    python -m scripts.mid_train
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --device_batch_size=16
    python -m scripts.mid_train --tasks=local          # conversations made on this machine, for small models

One pass over a mixture of conversations, packed into rows of max_seq_len. The same command goes on where an
interrupted run's newest checkpoint left off.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated

import torch
import torch.distributed as dist

from megacontext.attach import attach, batch_shape, meta_of, observe
from megacontext.config import MCConfig
from nanochat.common import UserError, autocast, compute_cleanup, compute_init, print0, print_banner, resolve_dtype
from nanochat.configurator import group, run
from nanochat.conversations import PackedConversations
from nanochat.loop import accumulation_steps, described, muon_momentum
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes
from nanochat.training import Training, decisive, parent_model
from tasks.mixtures import mid_mixture, mid_val


@dataclass
class Config:
    run: str = "dummy"
    """name of the W&B run; "dummy" for none (WANDB_MODE=offline keeps it on this machine)"""
    # What to train
    tasks: str = "full"
    """full (the hub's datasets), local (made here, for a CPU) or recall (too; of up to 6,000 characters)"""
    source: str = "base"
    """stage of the checkpoint to start from: base, mid, sft or rl"""
    model_tag: str = ""
    """model to start from, and folder of the new checkpoints; empty for the largest"""
    step: int = -1
    """checkpoint to start from; -1 for the newest"""
    # Runtime
    device_type: str = ""
    """cuda, cpu or mps; empty for the best there is"""
    dtype: str = "auto"
    """auto, bf16 or fp32: precision of the matrix products"""
    compile: str = "auto"
    """auto (on for CUDA), on or off: torch.compile"""
    # Horizon
    num_iterations: int = -1
    """optimization steps; -1 for one pass over the mixture"""
    # Optimization
    max_seq_len: int = -1
    """context length T; -1 for the model's own"""
    device_batch_size: int = 32
    """rows a process handles at once; lower it when memory runs out"""
    total_batch_size: int = 524288
    """tokens a step, over all processes; reached by accumulation"""
    embedding_lr: float = 0.2
    """AdamW, token embedding"""
    unembedding_lr: float = 0.004
    """AdamW, head"""
    matrix_lr: float = 0.02
    """Muon, block matrices"""
    weight_decay: float = 0.0
    """AdamW"""
    init_lr_frac: float = 1.0
    """part of these rates to use"""
    warmdown_ratio: float = 0.2
    """part of the run at its end in which the rates fall to 0"""
    # Evaluation
    eval_every: int = 150
    """steps between validations; -1 for never"""
    eval_tokens: int = 20 * 524288
    """tokens of one validation"""
    # Output
    save_every: int = -1
    """steps between checkpoints; -1 for only the last"""
    keep_last: int = -1
    """newest checkpoints to keep; -1 for all"""
    resume: bool = True
    """go on from the newest checkpoint in the folder, if any; 0 moves what is there aside and starts anew"""
    # MegaContext
    mc: bool = False
    """train the model to read gists too, and GistNet and LensNet with it"""
    megacontext: Annotated[MCConfig, group] = field(default_factory=MCConfig)
    """what follows counts with --mc only"""


def main(config: Config):
    _, rank, _, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    print_banner()

    model, tokenizer, parent, networks = parent_model(config.source, device, config.model_tag, config.step)
    T = model.config.sequence_len if config.max_seq_len == -1 else config.max_seq_len
    if not 0 < T <= model.max_seq_len:
        raise UserError(f"max_seq_len must be from 1 to the model's {model.max_seq_len} positions, got {T}")
    model.config.sequence_len = T
    B, _ = batch_shape(config, T)
    accumulation = accumulation_steps(config.total_batch_size, B, T, world_size)
    token_bytes = get_token_bytes(device)
    train_set, val_set = mid_mixture(config.tasks), mid_val(config.tasks)

    total = config.num_iterations if config.num_iterations > 0 else None
    settings = decisive(config, parent=parent)
    companion, make_objective = attach(config, model.config, device, networks)
    frozen = config.mc and config.megacontext.mc_freeze_base
    training = Training("mid", parent["model_tag"], config, settings, lambda: model, device, total, companion, frozen)
    if training.finished:
        compute_cleanup()
        return
    if networks and not companion:  # MegaContext's go on as they are
        training.carry(networks[0], megacontext=networks[1])
    compiled = training.compiled
    objective = make_objective(compiled)
    observe(config, "mid_train", training, objective)
    model = training.model  # after a resume, the parent's weights would stay in memory
    facts = {
        "Parent": f"{config.source} {parent['model_tag']}, step {parent['step']}",
        "Conversations": len(train_set),
        "Processes": world_size,
        "Micro-batches a step": accumulation,
        "Precision": str(dtype).removeprefix("torch."),
    }
    for name, value in facts.items():
        print0(f"{name}: {value}")
    batches = PackedConversations(train_set, tokenizer, B, T, device, training.loader_state)
    eval_steps = max(1, config.eval_tokens // (B * T * world_size))

    def validate():
        compiled.eval()
        loaders = [PackedConversations(val_set, tokenizer, B, T, device) for _ in range(2)]
        with autocast(device, dtype):
            bpb = evaluate_bpb(compiled, loaders[0], eval_steps, token_bytes)
            others = objective.validate(loaders[1], eval_steps, token_bytes)
        compiled.train()
        return bpb, others

    def part_done():
        """The part of the run that is done, the same on every rank."""
        if total:
            return training.step / total
        done = torch.tensor(batches.progress, device=device)
        if dist.is_initialized():
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return done.item()

    val_bpb, min_val_bpb = training.meta.get("val_bpb"), training.meta.get("min_val_bpb", math.inf)
    others = {}
    say, log = training.progress.say, training.log.log
    while True:
        done = part_done()
        last = done >= 1
        if training.due(config.eval_every, last):
            val_bpb, others = validate()
            min_val_bpb = min(min_val_bpb, val_bpb)
            say(f"step {training.step:,} | validation bpb {val_bpb:.4f}{described(others)}")
            log(**training.totals(), **{"val/bpb": val_bpb}, **others)
        if last or (training.step > 0 and training.due(config.save_every, last)):
            facts_of_mc = meta_of(config, T)
            training.save(
                last, batches.state_dict(), val_bpb=val_bpb, min_val_bpb=min_val_bpb, parent=parent, **facts_of_mc
            )
        if last:
            break

        training.begin_step()
        loss = torch.zeros((), device=device)
        for i in range(accumulation):
            x, y = next(batches)
            with autocast(device, dtype):
                part, stats = objective(x, y, done, seed=(training.step * accumulation + i) * world_size + rank)
            (part / accumulation).backward()
            loss += part.detach() / accumulation
        lrm = config.init_lr_frac * min(1.0, (1 - done) / max(config.warmdown_ratio, 1e-9))
        training.optimize(lrm, muon_momentum(training.step))
        loss = training.end_step(loss, config.total_batch_size, objective.work(done, T))
        training.show(f"bpb {val_bpb:.4f}" if val_bpb else "bpb -", done=part_done())
        metrics = {"train/loss": loss, "train/lrm": lrm, **training.speed()}
        log(**training.totals(), **metrics, **{name: float(value) for name, value in stats.items()})

    results = {
        "Iterations": training.step,
        "Validation bpb": val_bpb,
        **others,
        "Minimum validation bpb": min_val_bpb if math.isfinite(min_val_bpb) else None,
        **training.close(),
    }
    get_report().log(section="Midtraining", data=[asdict(config), facts, results])
    compute_cleanup()


if __name__ == "__main__":
    run(main, Config)
