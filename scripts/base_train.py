"""
Pretrain the base model.

    python -m scripts.base_train                                   # one GPU, or the CPU
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=1 --total_batch_size=512 \
        --num_iterations=20 --eval_tokens=512 --core_metric_every=-1        # a very small run

The same command goes on where an interrupted run's newest checkpoint left off.
"""

import math
import time
from dataclasses import asdict, dataclass

import torch

from nanochat import checkpoint_manager
from nanochat.common import (
    UserError,
    autocast,
    compute_cleanup,
    compute_init,
    peak_flops,
    print0,
    print_banner,
    resolve_dtype,
)
from nanochat.configurator import run
from nanochat.core_bundle import has_bundle, how_to_get_bundle
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import TokenLoader
from nanochat.dataset import list_row_groups
from nanochat.engine import Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.loop import (
    MicroBatches,
    ProgressLine,
    RunLog,
    accumulation_steps,
    clock,
    lr_multiplier,
    maybe_compile,
    muon_momentum,
    resume_step,
)
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import get_report
from nanochat.samples import sample_texts
from nanochat.sharding import clip_gradients
from nanochat.tokenizer import get_token_bytes, get_tokenizer


@dataclass
class Config:
    run: str = "dummy"
    """name of the W&B run; "dummy" for none (WANDB_MODE=offline keeps it on this machine)"""
    # Runtime
    device_type: str = ""
    """cuda, cpu or mps; empty for the best there is"""
    dtype: str = "auto"
    """auto, bf16 or fp32: precision of the matrix products"""
    compile: str = "auto"
    """auto (on for CUDA), on or off: torch.compile"""
    # Model
    depth: int = 20
    """layers; width, heads and the rest follow from it"""
    max_seq_len: int = 2048
    """context length T"""
    # Horizon: the first of these three that is positive
    num_iterations: int = -1
    """optimization steps"""
    target_flops: float = -1.0
    """train for this many FLOPs"""
    target_param_data_ratio: float = 20.0
    """train for this many tokens a parameter (Chinchilla: 20)"""
    # Optimization
    device_batch_size: int = 32
    """sequences a process handles at once; lower it when memory runs out"""
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
    streams: int = 1
    """streams of text that a micro-batch is put together from; more mix more documents into short batches"""
    grad_clip: float = 1.0
    """largest global gradient norm; 0 for no clipping"""
    warmup_ratio: float = 0.0
    """part of the steps in which the rate rises"""
    warmdown_ratio: float = 0.2
    """part of the steps in which it falls"""
    final_lr_frac: float = 0.0
    """what remains of the rate at the end"""
    # Evaluation
    eval_every: int = 250
    """steps between validations; -1 for never"""
    eval_tokens: int = 20 * 524288
    """tokens of one validation"""
    core_metric_every: int = 2000
    """steps between CORE evaluations; -1 for never"""
    core_metric_max_per_task: int = 500
    """examples a task during training"""
    sample_every: int = 2000
    """steps between samples; -1 for never"""
    # Output
    model_tag: str = ""
    """folder of the checkpoints; empty for d<depth>"""
    save_every: int = -1
    """steps between checkpoints; -1 for only the last"""
    resume: bool = True
    """go on from the newest checkpoint in the folder, if any; 0 moves what is there aside and starts anew"""


# Options that say how to watch a run; all others decide what comes out of it
WATCHING = {
    *("run", "resume", "save_every", "eval_every", "eval_tokens", "sample_every"),
    *("core_metric_every", "core_metric_max_per_task", "model_tag", "device_type", "compile"),
}


def horizon(config, flops_per_token, num_params) -> int:
    """Steps to take, from the first of num_iterations, target_flops and target_param_data_ratio that is set."""
    if config.num_iterations > 0:
        return config.num_iterations
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


def main(config: Config):
    is_dist, rank, _, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    print_banner()

    # Everything that could be missing is looked for before anything long begins
    B, T = config.device_batch_size, config.max_seq_len
    accumulation = accumulation_steps(config.total_batch_size, B, T, world_size)
    tokenizer = get_tokenizer()
    token_bytes = get_token_bytes(device)
    list_row_groups("train"), list_row_groups("val")
    core_every = config.core_metric_every if has_bundle() else -1
    if config.core_metric_every > 0 > core_every:
        print0(f"CORE will not be evaluated. {how_to_get_bundle()}")

    # Model
    model_config = GPTConfig.from_depth(config.depth, T, tokenizer.get_vocab_size())
    with torch.device("meta"):
        model = GPT(model_config)
    num_params, flops_per_token = model.num_params(), model.flops_per_token()
    num_iterations = horizon(config, flops_per_token, num_params)
    tag = config.model_tag or f"d{config.depth}"
    folder = checkpoint_manager.checkpoint_root("base") / tag
    settings = {key: value for key, value in asdict(config).items() if key not in WATCHING}
    resumed_at = resume_step(folder, config.resume, settings, num_iterations)
    if resumed_at == num_iterations:
        print0(f"{folder} is already trained to step {num_iterations}: nothing to do (--resume=0 trains anew)")
        compute_cleanup()
        return
    meta, state = {}, {"loader": None}
    if resumed_at is None:
        model.to_empty(device=device)
        model.init_weights()
    else:
        loaded = checkpoint_manager.load_checkpoint(folder, resumed_at, device, load_optimizer=True)
        model_data, optimizer_data, meta, state = loaded
        model = checkpoint_manager.build_model(model_data, meta["model_config"], device)
    model.train()
    compiled = maybe_compile(model, config.compile, device)
    optimizers = model.setup_optimizers(
        config.unembedding_lr, config.embedding_lr, config.matrix_lr, config.weight_decay
    )
    if resumed_at is not None:
        for optimizer, data in zip(optimizers, optimizer_data, strict=True):
            optimizer.load_state_dict(data)
        del model_data, optimizer_data
    muon = optimizers[1]

    tokens_total = num_iterations * config.total_batch_size
    facts = {
        "Number of parameters": num_params,
        "FLOPs per token": f"{flops_per_token:.3e}",
        "Iterations": num_iterations,
        "Training tokens": tokens_total,
        "Tokens per parameter": tokens_total / num_params,
        "Processes": world_size,
        "Micro-batches a step": accumulation,
        "Precision": str(dtype).removeprefix("torch."),
        "Device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }
    for name, value in facts.items():
        print0(f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}")

    # Data
    batches = MicroBatches(tokenizer, B, T, device, accumulation, config.streams, state["loader"])
    eval_steps = max(1, config.eval_tokens // (B * T * world_size))
    peak = peak_flops(device)

    def validate():
        compiled.eval()
        with TokenLoader(tokenizer, B, T, "val", device) as loader, autocast(device, dtype):
            bpb = evaluate_bpb(compiled, loader, eval_steps, token_bytes)
        compiled.train()
        return bpb

    def save(step):
        checkpoint_manager.save_checkpoint(
            folder,
            step,
            model.state_dict(),
            [optimizer.state_dict() for optimizer in optimizers],
            {
                "step": step,
                "val_bpb": val_bpb,
                "min_val_bpb": min_val_bpb,
                "smooth_loss": smooth_loss,
                "total_training_time": total_time,
                "wandb_id": log.wandb_id,
                "model_config": asdict(model_config),
                "user_config": asdict(config),
                "device_batch_size": B,
                "max_seq_len": T,
            },
            batches.state_dict(),
        )

    def totals():
        """What runs are compared by, at the current step."""
        return {
            "step": step,
            "total_training_flops": step * config.total_batch_size * flops_per_token,
            "total_training_time": total_time,
            "total_training_tokens": step * config.total_batch_size,
        }

    # Loop
    step = resumed_at or 0
    val_bpb, min_val_bpb = meta.get("val_bpb"), meta.get("min_val_bpb", math.inf)
    smooth_loss, total_time = meta.get("smooth_loss", 0.0), meta.get("total_training_time", 0.0)
    core_results = {}
    log = RunLog(f"base_{tag}", config.run, asdict(config), resumed_at is not None, meta.get("wandb_id"))
    progress = ProgressLine("base", num_iterations, step)
    if resumed_at is not None:
        checkpoint_manager.set_rng_state(state["rng"])
    while True:
        last = step == num_iterations
        fresh = step != resumed_at  # what follows was done before this checkpoint was written

        def due(every, last=last, fresh=fresh, step=step):
            return every > 0 and fresh and (last or step % every == 0)

        if due(config.eval_every):
            val_bpb = validate()
            min_val_bpb = min(min_val_bpb, val_bpb)
            progress.say(f"step {step:,} | validation bpb {val_bpb:.4f}")
            log.log(**totals(), **{"val/bpb": val_bpb})
        if due(core_every) and step > 0:
            with autocast(device, dtype), torch.no_grad():
                model.eval()
                core_results = evaluate_core(model, tokenizer, device, config.core_metric_max_per_task)
                model.train()
            progress.say(f"step {step:,} | CORE {core_results['core_metric']:.4f}")
            log.log(**totals(), core_metric=core_results["core_metric"])
        if due(config.sample_every) and step > 0 and rank == 0:
            with autocast(device, dtype):
                model.eval()
                for text in sample_texts(Engine(model, tokenizer), tokenizer):
                    progress.say(f"  {text!r}")
                model.train()
        if last or (config.save_every > 0 and fresh and step > 0 and step % config.save_every == 0):
            save(step)
        if last:
            break

        started = time.time()
        train_loss = torch.zeros((), device=device)
        for _ in range(accumulation):
            x, y = next(batches)
            with autocast(device, dtype):
                loss = compiled(x, y)
            train_loss += loss.detach() / accumulation
            (loss / accumulation).backward()
        norm = clip_gradients(optimizers, config.grad_clip) if config.grad_clip > 0 else None
        lrm = lr_multiplier(step, num_iterations, config.warmup_ratio, config.warmdown_ratio, config.final_lr_frac)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * lrm
        for group in muon.param_groups:
            group["momentum"] = muon_momentum(step)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if is_dist:
            torch.distributed.all_reduce(train_loss)
            train_loss /= world_size
        train_loss = train_loss.item()  # waits for the device
        seconds = time.time() - started
        if not math.isfinite(train_loss):
            raise UserError(
                f"the loss became {train_loss} at step {step}: lower the learning rates, or try --dtype=fp32; "
                f"checkpoints up to there are in {folder}"
            )

        step += 1
        smooth_loss = 0.9 * smooth_loss + 0.1 * train_loss
        shown_loss = smooth_loss / (1 - 0.9**step)
        if step > 10:
            total_time += seconds  # the first steps compile and warm up
        tok_per_sec = config.total_batch_size / seconds
        mfu = flops_per_token * tok_per_sec / (peak * world_size) if peak else None
        figures = [
            f"loss {shown_loss:.4f}",
            f"bpb {val_bpb:.4f}" if val_bpb else "bpb -",
            f"{tok_per_sec:,.0f} tok/s",
        ]
        if mfu is not None:
            figures.append(f"MFU {100 * mfu:.1f}%")
        progress.update(step, " | ".join(figures))
        log.log(
            **totals(),
            **{
                "train/loss": train_loss,
                "train/lrm": lrm,
                "train/grad_norm": None if norm is None else norm.item(),
                "train/dt": seconds,
                "train/tok_per_sec": tok_per_sec,
                "train/mfu": mfu,
            },
        )

    progress.close()
    batches.close()
    log.finish()
    peak_memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    print0(f"trained {num_iterations:,} steps in {clock(total_time)}; checkpoint in {folder}")
    results = {
        "Validation bpb": val_bpb,
        "Minimum validation bpb": min_val_bpb if math.isfinite(min_val_bpb) else None,
        "Final training loss": shown_loss,
        "CORE metric estimate": core_results.get("core_metric"),
        "MFU %": None if mfu is None else 100 * mfu,
        "Total training FLOPs": f"{num_iterations * config.total_batch_size * flops_per_token:.3e}",
        "Total training time": clock(total_time),
        "Peak memory (MiB)": peak_memory,
    }
    get_report().log(section="Base model training", data=[asdict(config), facts, results])
    compute_cleanup()


if __name__ == "__main__":
    run(main, Config)
