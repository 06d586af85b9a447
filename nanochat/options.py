"""Options that scripts share: a script's Config inherits the groups that it needs and adds its own."""

from dataclasses import dataclass
from typing import Annotated, Literal

from nanochat.configurator import OptionalInt, short
from nanochat.ranges import Amount, Count, Every, Range


@dataclass
class DeviceOptions:
    """Device and precision."""

    device_type: str = ""
    """cuda, cpu or mps; empty for the best available"""
    dtype: Annotated[str, short("-d")] = "auto"
    """precision of the matrix products: bf16, fp32, or auto, which is bf16 where that is faster"""


@dataclass
class ModelOptions:
    """Which model of a stage to load or to start from. The new checkpoints get a folder of the same name."""

    model_tag: Annotated[str, short("-g")] = ""
    """name of the model's folder; empty for the largest model"""
    step: Annotated[OptionalInt, Range(0, or_minus_one=True), short("-s", "--model_step")] = None
    """step of the checkpoint; -1 for the newest"""


@dataclass
class TrainingOptions(DeviceOptions):
    """Options of all training stages, see nanochat.training."""

    run: str = "dummy"
    """name of the W&B run; "dummy" for none (WANDB_MODE=offline keeps it on this machine)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile: on, off, or auto, which is on for CUDA"""
    save_every: Every = -1
    """steps between checkpoints; -1 for one at the end only"""
    keep_last: Count = -1
    """number of checkpoints to keep, the newest ones; -1 for all"""
    resume: bool = True
    """resume from the newest checkpoint in the folder, if any; 0 moves old checkpoints aside and starts again"""


@dataclass
class BatchOptions:
    """Sizes of batches with rows of equal length, and of validation."""

    device_batch_size: Count = 32
    """sequences per process in a micro-batch; lower it if memory runs out"""
    total_batch_size: Count = 524288
    """tokens per step over all processes, reached by gradient accumulation"""
    eval_tokens: Count = 20 * 524288
    """tokens per validation"""


@dataclass
class OptimizerOptions:
    """Learning rates for a model of width 768; they are scaled for other widths."""

    embedding_lr: Amount = 0.2
    """learning rate of the token embedding (AdamW)"""
    unembedding_lr: Amount = 0.004
    """learning rate of the head (AdamW)"""
    matrix_lr: Amount = 0.02
    """learning rate of the matrices of the blocks (Muon)"""
    weight_decay: Amount = 0.0
    """weight decay of AdamW"""


@dataclass
class FinetuningOptions(TrainingOptions, OptimizerOptions, ModelOptions):
    """Options of SFT and RL, whose rows differ in length."""

    compile: Literal["auto", "on", "off"] = "off"
    """torch.compile: off, or on (rows differ in length, so it recompiles often)"""
    num_epochs: Count = 1
    """passes over the conversations or problems"""
    num_iterations: Count = -1
    """optimization steps; -1 for num_epochs passes"""
