"""
Write a model for Hugging Face's transformers: safetensors, configuration, tokenizer with chat template.

    python -m scripts.export_hf -i sft --output my_model
    python -m scripts.export_hf -i base -g d20 -s 21400 --output d20-base --dtype=bf16

The folder loads with AutoModelForCausalLM and AutoTokenizer of transformers 5 and newer.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from nanochat.checkpoint_manager import load_model
from nanochat.common import resolve_dtype
from nanochat.configurator import run, short
from nanochat.hf_export import export_hf
from nanochat.options import ModelOptions


@dataclass
class Config(ModelOptions):
    output: Path = field(kw_only=True)
    """the folder to write"""
    source: Annotated[str, short("-i")] = "sft"
    """stage of the model: base, mid, sft or rl"""
    dtype: str = "fp32"
    """bf16 or fp32, precision of the weights; fp32 is what was trained, bf16 is half as large"""


def main(config: Config):
    model, tokenizer, meta = load_model(config.source, "cpu", "eval", config.model_tag, config.step)
    export_hf(config.output, model, tokenizer, resolve_dtype(config.dtype, "cpu"))
    print(f"{config.source} {meta['model_tag']}, step {meta['step']}, written to {config.output}")
    if "megacontext" in meta:
        print("it is the language model alone: MegaContext's networks beside the checkpoint are not exported")


if __name__ == "__main__":
    run(main, Config)
