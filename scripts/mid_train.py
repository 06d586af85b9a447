"""
Midtraining: teach a base model the format of chats, multiple choice, and the use of tools.

    python -m scripts.mid_train
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --device_batch_size=16
    python -m scripts.mid_train --tasks=local          # conversations generated on this machine, for small models

One pass over a mixture of conversations, packed into rows of max_seq_len. Run the same command again
to resume an interrupted run from its newest checkpoint.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megacontext.attach import MCOptions, attach, meta_of, observe, with_settings_of_networks
from nanochat.common import autocast, compute_init, resolve_dtype
from nanochat.configurator import run
from nanochat.conversations import PackedConversations
from nanochat.loop import accumulation_steps, muon_momentum
from nanochat.options import BatchOptions, ModelOptions, OptimizerOptions, TrainingOptions
from nanochat.ranges import Count, Every, Fraction
from nanochat.tokenizer import get_token_bytes
from nanochat.training import Training, parent_model, set_length
from tasks.mixtures import Tasks, mid_mixture, mid_val


@dataclass
class Config(MCOptions, TrainingOptions, BatchOptions, OptimizerOptions, ModelOptions):
    # What to train
    tasks: Tasks = "full"
    """full (datasets of the hub), local (generated, for a CPU), recall (generated, up to 6,000 characters) or memory
    (local, and recall in up to 2,000 characters)"""
    source: str = "base"
    """stage of the checkpoint to start from: base, mid, sft or rl"""
    num_iterations: Count = -1
    """optimization steps; -1 for one pass over the mixture"""
    # Optimization
    max_seq_len: Count = -1
    """context length T; -1 for that of the model"""
    init_lr_frac: Fraction = 1.0
    """factor of all learning rates"""
    warmdown_ratio: Fraction = 0.2
    """fraction of the run, at its end, in which the learning rates fall to 0"""
    # Evaluation
    eval_every: Every = 150
    """steps between validations; -1 for never"""

    def defaults(self) -> "Config":
        """See `with_settings_of_networks`."""
        return with_settings_of_networks(Config(), self) if self.mc else Config()


def main(config: Config):
    *_, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    config = replace(config, megacontext=replace(config.megacontext, mc_past=0))  # of conversations

    model, tokenizer, parent, networks = parent_model(config.source, device, config.model_tag, config.step)
    B, T = config.device_batch_size, set_length(model, config.max_seq_len)
    accumulation = accumulation_steps(config.total_batch_size, B, T, world_size)
    token_bytes = get_token_bytes(device)
    train_set, val_set = mid_mixture(config.tasks), mid_val(config.tasks)

    total = config.num_iterations if config.num_iterations > 0 else None
    companion, make_objective = attach(config, model.config, device, tokenizer.get_bos_token_id(), networks, model)
    frozen = config.mc and config.megacontext.mc_freeze_base

    def rate(done):
        """Multiplier of the learning rates when this part of the run is done."""
        return config.init_lr_frac * min(1.0, (1 - done) / max(config.warmdown_ratio, 1e-9))

    training = Training(
        *("mid", parent["model_tag"], config, model, tokenizer, device, total, lambda step, total: rate(step / total)),
        parent=parent,
        companion=companion,
        frozen=frozen,
        carried=None if companion else networks,
    )
    if training.finished:
        return
    objective = make_objective(training.model)
    observe(config, "mid_train", training)
    model = training.model  # free the parent's weights after a resume
    training.describe(dtype, **{"Conversations": len(train_set), "Micro-batches per step": accumulation})
    batches = training.batches = PackedConversations(train_set, tokenizer, B, T, device, training.loader_state)
    eval_steps = max(1, config.eval_tokens // (B * T * world_size))

    def part_done():
        """Completed fraction of the run, the same on every rank."""
        if total:
            return training.step / total
        done = torch.tensor(batches.progress, device=device)
        if dist.is_initialized():
            dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return done.item()

    training.notes |= meta_of(config, T)
    done = part_done()
    while True:
        last = done >= 1
        with training.evaluating(last):
            if training.due(config.eval_every, last):
                loader = PackedConversations(val_set, tokenizer, B, T, device)
                with autocast(device, dtype):
                    training.validated(objective.validate(loader, eval_steps, token_bytes))
        if last:
            break

        training.begin_step()
        loss, stats = training.accumulate(objective, batches, accumulation, done, dtype)
        lrm = rate(done)
        training.optimize(lrm, muon_momentum(training.step))
        loss = training.end_step(loss, config.total_batch_size, objective.work(done, T))
        done = part_done()
        training.show(done=done)
        training.record({"train/loss": loss, "train/lrm": lrm, **training.speed(), **stats})

    training.close("Midtraining", {"Iterations": training.step})


if __name__ == "__main__":
    run(main, Config)
