"""
Bits per byte of a base model on both splits, compared with gzip and xz, and sample texts.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss
"""

from dataclasses import dataclass
from itertools import chain

from megacontext.evaluation.validation import validate
from megacontext.inference import InferenceOptions, load_for_inference, session_maker
from megacontext.reader import Reader
from nanochat.checkpoint_manager import load_model
from nanochat.common import autocast, compute_init, print0, resolve_dtype
from nanochat.configurator import run
from nanochat.dataloader import TokenLoader
from nanochat.dataset import iter_documents
from nanochat.engine import Engine
from nanochat.loss_eval import evaluate_bpb
from nanochat.options import DeviceOptions, ModelOptions
from nanochat.ranges import Count
from nanochat.report import compression_yardstick, fenced, get_report
from nanochat.samples import sample_texts
from nanochat.sources import first
from nanochat.tokenizer import get_token_bytes

YARDSTICK_BYTES = 20_000_000  # of validation text, at most: xz takes about a second per megabyte


@dataclass
class Config(ModelOptions, DeviceOptions, InferenceOptions):
    device_batch_size: Count = 32
    """sequences per batch"""
    split_tokens: Count = 20 * 524288
    """tokens to evaluate per split"""
    mc: bool = False
    """also evaluate the newest tokens given working contexts, and generate the samples with MegaContext"""


def main(config: Config):
    _, rank, _, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    model, tokenizer, meta = load_model("base", device, "eval", config.model_tag, config.step, config.mc)
    mc = load_for_inference("base", meta, device, config.megacontext, model) if config.mc else None
    B, T = config.device_batch_size, model.config.sequence_len
    steps = max(1, config.split_tokens // (B * T * world_size))
    token_bytes = get_token_bytes(device)

    results = {"Model": f"{meta['model_tag']} (step {meta['step']})"}
    for split in ("train", "val"):
        with TokenLoader(tokenizer, B, T, split, device) as loader, autocast(device, dtype):
            results[f"{split} bpb"] = evaluate_bpb(model, loader, steps, token_bytes)
        print0(f"{split} bpb: {results[f'{split} bpb']:.4f}")
    if mc:
        with TokenLoader(tokenizer, B, T, "val", device) as loader, autocast(device, dtype):
            results |= validate(Reader(model, *mc), loader, steps, token_bytes)
        print0(f"val bpb of the newest tokens in a working context: {results['val/mc_bpb']:.4f}")
    samples = []
    if rank == 0:
        documents = chain.from_iterable(iter_documents("val"))
        text = b"".join(first(YARDSTICK_BYTES, (document.encode() for document in documents)))
        results["Yardstick text (bytes)"] = len(text)
        results |= compression_yardstick(text)
        for name in ("gzip -9 (bpb)", "xz -9 (bpb)"):
            print0(f"{name}: {results[name]:.4f}")
        get_report().log(section="Base model loss", data=[results])  # samples may fail
        with autocast(device, dtype):
            make_session = session_maker(model, *mc) if mc else None
            samples = sample_texts(Engine(model, tokenizer), tokenizer, make_session=make_session)
        for sample in samples:
            print0(f"---\n{sample}")
    shown = "\n\n".join(map(fenced, samples))
    get_report().log(section="Base model loss", data=[results, f"### Samples\n\n{shown}"])


if __name__ == "__main__":
    run(main, Config)
