"""Options that scripts share: a script's Config is a dataclass that inherits those it has, and adds its own."""

from dataclasses import dataclass
from typing import Annotated

from nanochat.configurator import OptionalInt, short


@dataclass
class DeviceOptions:
    """Where and how precisely to compute."""

    device_type: str = ""
    """cuda, cpu or mps; empty for the best there is"""
    dtype: Annotated[str, short("-d")] = "auto"
    """auto, bf16 or fp32: precision of the matrix products"""


@dataclass
class ModelOptions:
    """Which model of a stage to load, or to start from. A stage keeps its checkpoints in a folder of the same name."""

    model_tag: Annotated[str, short("-g")] = ""
    """model to load, by the name of its folder; empty for the largest"""
    step: Annotated[OptionalInt, short("-s", "--model_step")] = None
    """checkpoint to load; -1 for the newest"""


@dataclass
class TrainingOptions(DeviceOptions):
    """What every training stage reads, see nanochat.training."""

    run: str = "dummy"
    """name of the W&B run; "dummy" for none (WANDB_MODE=offline keeps it on this machine)"""
    compile: str = "auto"
    """auto (on for CUDA), on or off: torch.compile"""
    save_every: int = -1
    """steps between checkpoints; -1 for only the last"""
    keep_last: int = -1
    """newest checkpoints to keep; -1 for all"""
    resume: bool = True
    """go on from the newest checkpoint in the folder, if any; 0 moves what is there aside and starts anew"""


@dataclass
class OptimizerOptions:
    """Learning rates for a model of width 768; others are scaled from there."""

    embedding_lr: float = 0.2
    """AdamW, token embedding"""
    unembedding_lr: float = 0.004
    """AdamW, head"""
    matrix_lr: float = 0.02
    """Muon, block matrices"""
    weight_decay: float = 0.0
    """AdamW"""
