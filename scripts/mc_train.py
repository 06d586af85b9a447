"""
Attach MegaContext to a trained model: the model stays as it is, GistNet and LensNet learn to serve it.

    python -m scripts.mc_train                                   # the largest base model → <tag>-mc
    python -m scripts.mc_train -i sft -g d20 --num_iterations=2000
    torchrun --standalone --nproc_per_node=8 -m scripts.mc_train -- -i base

The text is that of pretraining. The result is a checkpoint of the same stage, of the same weights with the two
networks beside them. The same command goes on where an interrupted run's newest checkpoint left off.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated

from megacontext.attach import attach, meta_of, observe
from megacontext.config import MCConfig
from nanochat.common import UserError, autocast, compute_cleanup, compute_init, print_banner, resolve_dtype
from nanochat.configurator import group, run, short
from nanochat.dataloader import TokenLoader
from nanochat.loop import MicroBatches, accumulation_steps, described, lr_multiplier, muon_momentum, print_facts
from nanochat.options import ModelOptions, TrainingOptions
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes
from nanochat.training import Training, parent_model


@dataclass
class Config(TrainingOptions, ModelOptions):
    source: Annotated[str, short("-i")] = "base"
    """stage of the model: base, mid, sft or rl"""
    output_tag: str = ""
    """folder of the result; empty for <model_tag>-mc"""
    # Training
    num_iterations: int = 1000
    """optimization steps"""
    max_seq_len: int = -1
    """context length T; -1 for the model's own"""
    device_batch_size: int = 32
    """sequences a process handles at once; lower it when memory runs out"""
    total_batch_size: int = 524288
    """tokens per step, over all processes; reached by accumulation"""
    streams: int = 1
    """streams of text that a micro-batch is put together from"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0 for no clipping"""
    warmdown_ratio: float = 0.2
    """part of the steps in which the rate falls to 0"""
    # Evaluation
    eval_every: int = 100
    """steps between validations; -1 for never"""
    eval_tokens: int = 20 * 524288
    """tokens of one validation"""
    # MegaContext
    megacontext: Annotated[MCConfig, group] = field(default_factory=MCConfig)
    """its settings"""


def main(config: Config):
    *_, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    print_banner()
    if config.num_iterations < 1:
        raise UserError(f"num_iterations must be at least 1, got {config.num_iterations}")
    config = replace(config, megacontext=replace(config.megacontext, mc_freeze_base=True))

    model, tokenizer, parent, _ = parent_model(config.source, device, config.model_tag, config.step)
    T = model.config.sequence_len if config.max_seq_len == -1 else config.max_seq_len
    if not 0 < T <= model.max_seq_len:
        raise UserError(f"max_seq_len must be from 1 to the model's {model.max_seq_len} positions, got {T}")
    model.config.sequence_len = T
    B, streams = config.device_batch_size, config.streams
    accumulation = accumulation_steps(config.total_batch_size, B, T, world_size)
    token_bytes = get_token_bytes(device)

    tag = config.output_tag or f"{parent['model_tag']}-mc"
    if tag == parent["model_tag"]:
        raise UserError(f"output_tag must differ from the model's own, {tag!r}, whose checkpoints stay as they are")
    companion, make_objective = attach(config, model.config, device, tokenizer.get_bos_token_id())

    def rate(step, total):
        return lr_multiplier(step, total, warmdown_ratio=config.warmdown_ratio)

    training = Training(
        *(config.source, tag, config, model, tokenizer, device, config.num_iterations, rate),
        parent=parent,
        companion=companion,
        frozen=True,
    )
    if training.finished:
        compute_cleanup()
        return
    objective = make_objective(training.compiled)
    observe(config, "mc_train", training)
    model = training.model  # after a resume, the parent's weights would stay in memory
    facts = {
        "Parent": f"{config.source} {parent['model_tag']}, step {parent['step']}",
        "Parameters of the model, frozen": model.num_params(),
        "Parameters of GistNet": sum(p.numel() for p in companion.gistnet.parameters()),
        "Parameters of LensNet": sum(p.numel() for p in companion.lensnet.parameters()),
        "Micro-batches per step": accumulation,
    }
    print_facts(facts)
    batches = training.batches = MicroBatches(tokenizer, B, T, device, accumulation, streams, training.loader_state)
    eval_steps = max(1, config.eval_tokens // (B * T * world_size))

    training.notes |= meta_of(config, T)
    figures = {}
    say = training.progress.say
    while True:
        step = training.step
        last = step == config.num_iterations
        with training.evaluating(last):
            if training.due(config.eval_every, last):
                with TokenLoader(tokenizer, B, T, "val", device) as loader, autocast(device, dtype):
                    figures = objective.validate(loader, eval_steps, token_bytes)
                training.notes |= figures
                say(f"step {step:,}{described(figures)}")
                training.record(figures)
        if last:
            break

        training.begin_step()
        progress = step / config.num_iterations
        loss, stats = training.accumulate(objective, batches, accumulation, progress, dtype)
        lrm = rate(step, config.num_iterations)
        training.optimize(lrm, muon_momentum(step), config.grad_clip)
        loss = training.end_step(loss, config.total_batch_size, objective.work(progress, T))
        gain = figures.get("val/mc_context_gain")
        training.show("gain -" if gain is None or math.isnan(gain) else f"gain {100 * gain:.1f}%")
        training.record({"train/loss": loss, "train/lrm": lrm, **training.speed(), **stats})

    batches.close()
    get_report().log(section="MegaContext training", data=[asdict(config), facts, {**figures, **training.close()}])
    compute_cleanup()


if __name__ == "__main__":
    run(main, Config)
