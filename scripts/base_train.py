"""
Pretrain the base model.

    python -m scripts.base_train                                   # one GPU, or the CPU
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=1 --total_batch_size=512 \
        --num_iterations=20 --eval_tokens=512 --core_metric_every=-1        # a very small run

Run the same command again to resume an interrupted run from its newest checkpoint.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch

from megacontext.attach import MCOptions, attach, generating, meta_of, observe
from megacontext.config import MCConfig
from nanochat.common import UserError, autocast, compute_init, print0, resolve_dtype, sum_over_ranks
from nanochat.configurator import group, run
from nanochat.core_bundle import has_bundle, how_to_get_bundle, load_bundle
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import TokenLoader
from nanochat.dataset import check_data
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.loop import MicroBatches, accumulation_steps, lr_multiplier, muon_momentum
from nanochat.options import BatchOptions, OptimizerOptions, TrainingOptions
from nanochat.ranges import Amount, Count, CountOrAll, Every, Fraction, Range
from nanochat.samples import sample_texts
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.training import WARM_UP, Training


@dataclass
class Config(MCOptions, TrainingOptions, BatchOptions, OptimizerOptions):
    # Model
    depth: Annotated[int, Range(1, 1000)] = 20
    """number of layers; width and heads follow from it"""
    max_seq_len: Count = 2048
    """context length T"""
    model_tag: str = ""
    """folder of the checkpoints; empty for d<depth>"""
    # Horizon: the first of these four that is positive
    num_iterations: Count = -1
    """optimization steps"""
    target_minutes: Amount = -1.0
    """train for about this many minutes: the speed of the first steps determines the number of steps, once"""
    target_flops: Amount = -1.0
    """train for this many FLOPs"""
    target_param_data_ratio: Annotated[float, Range(0, 1e30, or_minus_one=True)] = 20.0
    """train for this many tokens per parameter (Chinchilla: 20)"""
    # Optimization
    streams: Count = 1
    """streams of text in a micro-batch, a divisor of device_batch_size; more streams mix more documents"""
    piece_tokens: Count = -1
    """split the text of each row group into pieces of this many tokens and shuffle them; -1 to read it in order"""
    grad_clip: Amount = 1.0
    """largest global gradient norm; 0 for no clipping"""
    warmup_ratio: Fraction = 0.0
    """fraction of the steps, at the start, in which the learning rate rises from 0"""
    warmdown_ratio: Fraction = 0.2
    """fraction of the steps, at the end, in which the learning rate falls"""
    final_lr_frac: Fraction = 0.0
    """final learning rate, as a fraction of the full one"""
    # Evaluation
    eval_every: Every = 250
    """steps between validations; -1 for never"""
    core_metric_every: Every = 2000
    """steps between CORE evaluations; -1 for never"""
    core_metric_max_per_task: CountOrAll = 500
    """examples per task during training"""
    sample_every: Every = 2000
    """steps between samples; -1 for never"""
    # A new model learns more, and in less time, if it first learns alone (dev/LOG.md)
    megacontext: Annotated[MCConfig, group] = field(default_factory=lambda: MCConfig(mc_start=0.6))
    """these options have an effect with --mc only"""


MEASURED = 20  # after this many steps, their speed makes a number of steps of --target_minutes


def horizon(config, flops_per_token, num_params) -> int | None:
    """Number of steps, by the first option of the horizon that is set; None if they are to be measured first."""
    if config.num_iterations > 0:
        return config.num_iterations
    if config.target_minutes > 0:
        if config.warmup_ratio > 0:
            raise UserError("--target_minutes takes no --warmup_ratio: the first steps are those that are measured")
        return None
    if config.target_flops > 0:
        steps = round(config.target_flops / (flops_per_token * config.total_batch_size))
    elif config.target_param_data_ratio > 0:
        steps = int(config.target_param_data_ratio * num_params // config.total_batch_size)
    else:
        raise UserError("no horizon: set --num_iterations, --target_flops or --target_param_data_ratio above 0")
    if steps < 1:
        raise UserError(
            f"the horizon is less than one step of {config.total_batch_size:,} tokens: lower --total_batch_size"
        )
    return steps


def relative_work(objective, T) -> float:
    """FLOPs of a step, averaged over the training, as a multiple of those of its first step."""
    return sum(objective.work(i / 100, T) for i in range(100)) / (100 * objective.work(0.0, T))


def main(config: Config):
    _, rank, _, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)

    if config.mc and config.megacontext.mc_freeze_base:
        raise UserError(
            "--mc_freeze_base: expected a trained model, but this one is new: train it first, then use "
            "scripts.mc_train, or scripts.mid_train with this option"
        )
    # Check all inputs before anything long begins
    T = config.max_seq_len
    B, streams = config.device_batch_size, config.streams
    accumulation = accumulation_steps(config.total_batch_size, B, T, world_size)
    tokenizer = get_tokenizer()
    token_bytes = get_token_bytes(device)
    check_data(world_size)
    core_every = config.core_metric_every if has_bundle() else -1
    if config.core_metric_every > 0 > core_every:
        print0(f"CORE will not be evaluated. {how_to_get_bundle()}")
    if core_every > 0:
        load_bundle(max_per_task=config.core_metric_max_per_task)

    # Model
    model_config = GPTConfig.from_depth(config.depth, T, tokenizer.get_vocab_size())
    with torch.device("meta"):
        model = GPT(model_config)
    num_iterations = horizon(config, model.flops_per_token(), model.num_params())

    tag = config.model_tag or f"d{config.depth}"
    companion, make_objective = attach(config, model_config, device, tokenizer.get_bos_token_id())
    if config.mc and config.sample_every > 0:
        config.megacontext.resolve(T).check_session(T)  # checked now, not when the first samples are due

    def rate(step, total):
        return lr_multiplier(step, total, config.warmup_ratio, config.warmdown_ratio, config.final_lr_frac)

    training = Training("base", tag, config, model, tokenizer, device, num_iterations, rate, companion=companion)
    if training.finished:
        return
    if num_iterations is None and training.meta.get("total"):
        training.set_total(training.meta["total"])
    model, objective = training.model, make_objective(training.model)
    observe(config, "base_train", training)

    def length():
        steps = training.total
        return {"Iterations": steps, "Tokens per parameter": steps * config.total_batch_size / model.num_params()}

    facts = {
        **(length() if training.total else {"Minutes": config.target_minutes}),
        "Number of parameters": model.num_params(),
        "FLOPs per token": f"{model.flops_per_token():.3e}",
        "Micro-batches per step": accumulation,
        "Device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    training.describe(dtype, **facts)

    # Data
    batches = training.batches = MicroBatches(
        *(tokenizer, B, T, device, accumulation, streams, training.loader_state, config.piece_tokens, objective.keeper)
    )
    eval_steps = max(1, config.eval_tokens // (B * T * world_size))

    # Loop
    training.notes |= meta_of(config, T)
    core_results = {}
    say = training.progress.say
    while True:
        step = training.step
        if training.total is None and step == MEASURED:
            rank_seconds = torch.tensor(training.total_time / (step - WARM_UP), device=device)
            seconds = (sum_over_ranks(rank_seconds) / world_size).item() * relative_work(objective, T)
            training.set_total(max(step + 1, round(60 * config.target_minutes / seconds)))
            training.facts |= length()
            say(f"{training.total:,} steps take {config.target_minutes:g} minutes, judging by the first {step}")
        last = step == training.total
        with training.evaluating(last):
            if training.due(config.eval_every, last):
                with TokenLoader(tokenizer, B, T, "val", device) as loader, autocast(device, dtype):
                    training.validated(objective.validate(loader, eval_steps, token_bytes))
            if step > 0 and training.due(core_every, last):
                with autocast(device, dtype), torch.no_grad():
                    model.eval()
                    core_results = evaluate_core(model, tokenizer, device, config.core_metric_max_per_task)
                    model.train()
                say(f"step {step:,} | CORE {core_results['core_metric']:.4f}")
                training.record({"core_metric": core_results["core_metric"]})
            if step > 0 and rank == 0 and training.due(config.sample_every, last):
                with autocast(device, dtype), generating(config, training) as make_session:
                    for text in sample_texts(Engine(model, tokenizer), tokenizer, make_session=make_session):
                        say(f"  {text!r}")
        if last:
            break

        training.begin_step()
        progress = step / training.total if training.total else 0.0
        loss, stats = training.accumulate(objective, batches, accumulation, progress, dtype)
        lrm = rate(step, training.total) if training.total else 1.0
        norm = training.optimize(lrm, muon_momentum(step), config.grad_clip)
        loss = training.end_step(loss, config.total_batch_size, objective.work(progress, T))
        training.show()
        training.record({"train/loss": loss, "train/lrm": lrm, "train/grad_norm": norm, **training.speed(), **stats})

    batches.close()
    training.close("Base model training", {"CORE metric estimate": core_results.get("core_metric")})


if __name__ == "__main__":
    run(main, Config)
