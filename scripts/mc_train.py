"""
Train GistNet and LensNet for a trained model, which stays unchanged: new ones, or those that it has learned with, whose
gists gain from more steps when the model changes no more.

    python -m scripts.mc_train                                   # the largest base model → <tag>-mc
    python -m scripts.mc_train -i sft -g d20 --num_iterations=2000
    python -m scripts.mc_train --hf-path SmolLM2-135M.gguf --max_seq_len=1024    # a model of transformers
    torchrun --standalone --nproc_per_node=8 -m scripts.mc_train -- -i base

It trains on the pretraining text. The result is a checkpoint of the same stage with the unchanged weights and the two
networks; for a model of transformers, with the networks only. Run the same command again to resume an interrupted run
from its newest checkpoint.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
import torch.distributed as dist

from megacontext.attach import attach, meta_of, observe, with_settings_of_networks
from megacontext.config import MCConfig
from nanochat import pretrained
from nanochat.common import UserError, autocast, compute_init, resolve_dtype
from nanochat.configurator import group, run, short
from nanochat.dataloader import TokenLoader
from nanochat.loop import MicroBatches, accumulation_steps, lr_multiplier, muon_momentum
from nanochat.options import BatchOptions, TrainingOptions
from nanochat.pretrained import PretrainedOptions
from nanochat.ranges import Amount, Count, Every, Fraction
from nanochat.tokenizer import count_token_bytes
from nanochat.training import Training, set_length

COUNTED = 2**18  # tokens from which token frequencies are estimated


@dataclass
class Config(TrainingOptions, BatchOptions, PretrainedOptions):
    source: Annotated[str, short("-i")] = "base"
    """stage of the model: base, mid, sft or rl"""
    output_tag: str = ""
    """tag (folder) of the new checkpoints; empty for <model_tag>-mc, or with --hf-path for the name of the model"""
    # Training
    num_iterations: Count = 1000
    """optimization steps"""
    max_seq_len: Count = -1
    """context length T; -1 for that of the model"""
    streams: Count = 1
    """streams of text in a micro-batch, a divisor of device_batch_size; more streams mix more documents"""
    grad_clip: Amount = 1.0
    """largest global gradient norm; 0 for no clipping"""
    warmdown_ratio: Fraction = 0.2
    """fraction of the steps, at the end, in which the learning rate falls to 0"""
    # Evaluation
    eval_every: Every = 100
    """steps between validations; -1 for never"""
    # MegaContext
    megacontext: Annotated[MCConfig, group] = field(
        default_factory=lambda: MCConfig(
            mc_positional="rank",
            gistnet_type="copied",
            gistnet_start="last",
            mc_gist_limit=32,
            mc_beside=0.9,
        )
    )
    """settings of MegaContext; where a model has networks, the defaults are what they were made with, and LensNet is
    not trained"""

    def defaults(self) -> "Config":
        """See `with_settings_of_networks`. A LensNet that has learned from chats forgets them on pretraining text."""
        return Config() if self.hf_path else with_settings_of_networks(Config(), self, mc_lens_loss_weight=0.0)


@torch.no_grad()
def start_of_lensnet(model, tokenizer, loader):
    """
    The arguments of `LensNet.whiten`: the model's embeddings [V, D]; the count of each token, [V], in COUNTED tokens of
    text or more per rank; states of the first rank's first batch; ids of the special tokens and roles around the turns
    of a chat.
    """
    V = tokenizer.get_vocab_size()
    counts, ids = torch.zeros(V, device=loader.device), torch.arange(V, device=loader.device)
    x = first = next(loader)[0]
    while counts.sum() < COUNTED:
        counts += x.flatten().bincount(minlength=V)
        x = next(loader)[0]
    states = model.states(model.embed(first)).flatten(0, 1).float()
    if dist.is_initialized():
        dist.all_reduce(counts)
        dist.broadcast(states, 0)
    empty = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
    around = list(tokenizer.special_ids)
    around = torch.tensor(around + tokenizer.render_for_completion({"messages": empty}), device=loader.device)
    return model.embed(ids[None])[0].float(), counts, states, around


def main(config: Config):
    *_, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    config = replace(config, megacontext=replace(config.megacontext, mc_freeze_base=True))

    source, model, tokenizer, parent, networks = pretrained.parent(config, device)
    B, T, streams = config.device_batch_size, set_length(model, config.max_seq_len), config.streams
    accumulation = accumulation_steps(config.total_batch_size, B, T, world_size)
    token_bytes = count_token_bytes(tokenizer).to(device)

    tag = config.output_tag or parent["model_tag"] + "-mc" * (not config.hf_path)
    if tag == parent["model_tag"] and not config.hf_path:
        raise UserError(f"output_tag must differ from the model's tag {tag!r}, whose checkpoints stay unchanged")
    companion, make_objective = attach(config, model.config, device, tokenizer.get_bos_token_id(), networks, model)

    def rate(step, total):
        return lr_multiplier(step, total, warmdown_ratio=config.warmdown_ratio)

    training = Training(
        *(source, tag, config, model, tokenizer, device, config.num_iterations, rate),
        parent=parent,
        companion=companion,
        frozen=True,
    )
    if training.finished:
        return
    if training.step == 0 and not companion.lensnet.match.any():  # has not learned yet
        with TokenLoader(tokenizer, B, T, "train", device) as loader, autocast(device, dtype):
            companion.lensnet.whiten(*start_of_lensnet(model, tokenizer, loader))
    objective = make_objective(training.model)
    observe(config, "mc_train", training)
    model = training.model  # free the parent's weights after a resume
    facts = {
        "GistNet and LensNet": "new" if networks is None else "those of the model",
        "Parameters of the model, frozen": model.num_params(),
        "Parameters of GistNet": sum(p.numel() for p in companion.gistnet.parameters()),
        "Parameters of LensNet": sum(p.numel() for p in companion.lensnet.parameters()),
        "Micro-batches per step": accumulation,
    }
    training.describe(dtype, **facts)
    batches = training.batches = MicroBatches(
        tokenizer, B, T, device, accumulation, streams, training.loader_state, keeper=objective.keeper
    )
    eval_steps = max(1, config.eval_tokens // (B * T * world_size))

    training.notes |= meta_of(config, T)
    while True:
        step = training.step
        last = step == config.num_iterations
        with training.evaluating(last):
            if training.due(config.eval_every, last):
                with TokenLoader(tokenizer, B, T, "val", device) as loader, autocast(device, dtype):
                    training.validated(objective.validate(loader, eval_steps, token_bytes))
        if last:
            break

        training.begin_step()
        progress = step / config.num_iterations
        loss, stats = training.accumulate(objective, batches, accumulation, progress, dtype)
        lrm = rate(step, config.num_iterations)
        training.optimize(lrm, muon_momentum(step), config.grad_clip)
        loss = training.end_step(loss, config.total_batch_size, objective.work(progress, T))
        gain = training.validation.get("val/mc_context_gain")
        training.show("gain -" if gain is None else f"gain {100 * gain:.1f}%")
        training.record({"train/loss": loss, "train/lrm": lrm, **training.speed(), **stats})

    batches.close()
    training.close("MegaContext training", {})


if __name__ == "__main__":
    run(main, Config)
