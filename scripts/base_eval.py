"""
Score a base model on the CORE metric (22 in-context-learning tasks of DCLM).

    python -m scripts.base_eval
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval
    python -m scripts.base_eval --hf-path openai-community/gpt2
    python -m scripts.base_eval --mc                       # read prompts through a working context

The tasks come from the evaluation bundle in $NANOCHAT_BASE_DIR/eval_bundle, which is fetched if it is not there.
"""

from dataclasses import dataclass

import torch.distributed as dist

from megacontext.inference import InferenceOptions, SessionScorer, load_for_inference, session_maker
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, atomic_write, autocast, compute_init, get_base_dir, print0, resolve_dtype
from nanochat.configurator import run
from nanochat.core_bundle import download_bundle, has_bundle
from nanochat.core_eval import evaluate_core
from nanochat.loop import ProgressLine
from nanochat.options import DeviceOptions, ModelOptions
from nanochat.pretrained import PretrainedTokenizer, from_transformers, name_of
from nanochat.ranges import Count
from nanochat.report import get_report


@dataclass
class Config(ModelOptions, DeviceOptions, InferenceOptions):
    hf_path: str | None = None
    """score this Hugging Face model (a name on the hub, a folder or a .gguf file) instead of our own"""
    max_per_task: Count = -1
    """examples per task, at most; -1 for all"""


class HFModel:
    """Wraps a causal language model of transformers as a function from ids [B, T] to logits [B, T, V]."""

    def __init__(self, model):
        self.model = model
        self.max_seq_len = getattr(model.config, "max_position_embeddings", None)

    def __call__(self, ids):
        return self.model(input_ids=ids).logits


def as_csv(core) -> str:
    """The accuracies of the tasks, and last the metric."""
    centered = core["centered_results"]
    rows = [f"{label},{accuracy:.6f},{centered[label]:.6f}\n" for label, accuracy in core["results"].items()]
    return f"Task,Accuracy,Centered\n{''.join(rows)}CORE,,{core['core_metric']:.6f}\n"


def main(config):
    is_dist, rank, _, _, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    # A Hugging Face model is for comparison, it is not the base model of this report
    section = f"CORE evaluation of {config.hf_path}" if config.hf_path else "Base model evaluation"
    if config.mc:
        if config.hf_path:
            raise UserError(
                "--mc needs networks that a Hugging Face model does not have: leave out one of the two options"
            )
        section += " with MegaContext"

    if config.hf_path:
        model, tokenizer, _ = from_transformers(config.hf_path, dtype)
        model, tokenizer = HFModel(model.to(device)), PretrainedTokenizer(tokenizer)
        name, file_name = config.hf_path, name_of(config.hf_path)
    else:
        model, tokenizer, meta = load_model("base", device, "eval", config.model_tag, config.step, config.mc)
        name = f"{meta['model_tag']} (step {meta['step']:,})"
        file_name = f"{meta['model_tag']}_{meta['step']:06d}"
    mc = load_for_inference("base", meta, device, config.megacontext, model) if config.mc else None

    reason = ""
    if rank == 0:
        try:
            download_bundle()
        except UserError as error:
            reason = str(error)
    if is_dist:
        dist.barrier()
    if not has_bundle():
        print0(f"CORE: not run, {reason}")
        get_report().log(section, ["CORE: not run (there was no evaluation bundle)"])
        return

    with autocast(device, dtype):
        if mc:
            model, file_name = SessionScorer(session_maker(model, *mc)), f"{file_name}_mc"
        line = ProgressLine("CORE", None, unit="example")

        def show(label, done, of):
            line.update(done, f"of {of:,} | {label}", done / of)

        core = evaluate_core(model, tokenizer, device, config.max_per_task, progress=show)
        line.close()

    if rank == 0:
        path = get_base_dir() / "base_eval" / f"{file_name}.csv"
        with atomic_write(path, "w") as file:
            file.write(as_csv(core))
        print(f"CORE of {name}\n{as_csv(core)}written to {path}")
    summary = {"Model": name, "CORE metric": core["core_metric"]}
    if config.max_per_task > 0:
        summary["Examples per task (at most)"] = config.max_per_task
    get_report().log(section, [summary, core["centered_results"]])


if __name__ == "__main__":
    run(main, Config)
