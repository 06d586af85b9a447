"""
Score a model on tasks of EleutherAI's lm-evaluation-harness.

    python -m scripts.lm_eval -i base --tasks=hellaswag,arc_easy
    python -m scripts.lm_eval -i sft --chat --tasks=gsm8k --limit=100
    python -m scripts.lm_eval -i base --include_path=my_tasks --tasks=mine
    python -m scripts.lm_eval -i base --mc --tasks=niah_single_1   # contexts of any length

Needs `uv sync --extra lm-eval`. Most tasks download their data from the Hugging Face hub; YAML files of your own can
use other data. Python functions named in such a file are run: read files that you did not write.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from megacontext.inference import InferenceOptions, SessionScorer, load_for_inference, session_maker
from nanochat import pretrained
from nanochat.common import UserError, atomic_write, autocast, compute_init, get_base_dir, resolve_dtype
from nanochat.configurator import run, short
from nanochat.options import DeviceOptions
from nanochat.pretrained import PretrainedOptions
from nanochat.ranges import Count, Range
from nanochat.report import get_report


@dataclass
class Config(PretrainedOptions, DeviceOptions, InferenceOptions):
    tasks: str = field(kw_only=True)
    """names of tasks, separated by commas; * matches anything"""
    source: Annotated[str, short("-i")] = "base"
    """stage of the model: base, mid, sft or rl"""
    include_path: Path | None = None
    """folder of YAML files to take tasks from, instead of those of the harness"""
    num_fewshot: Annotated[int | None, Range(0)] = None
    """solved examples before each question (default: as defined by the task)"""
    limit: Annotated[int | None, Range(1)] = None
    """examples per task, at most"""
    chat: bool = False
    """ask in the chat format, for mid, sft and rl"""
    gen_kwargs: str = ""
    """options for generated answers, such as max_gen_toks=64,temperature=0"""
    batch_size: Count = 8
    """rows per batch"""


def main(config: Config):
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

        from nanochat.lm_eval_adapter import HarnessLM
    except ImportError as error:
        raise UserError("this needs the package lm-eval: run `uv sync --extra lm-eval`") from error

    *_, device = compute_init(config.device_type)
    own = config.include_path
    if own is not None and not own.is_dir():
        raise UserError(f"--include_path takes a folder of YAML files, got {own}")
    # Loading the harness's own tasks takes half a minute, so only when they are needed
    manager = TaskManager(include_path=None if own is None else str(own), include_defaults=own is None)
    wanted = [name.strip() for name in config.tasks.split(",") if name.strip()]
    unknown = [name for name in wanted if not manager.match_tasks([name])]
    if unknown or not wanted:
        raise UserError(f"there is no task {', '.join(unknown) or 'without a name'}: see `lm-eval ls tasks`")
    source, model, tokenizer, meta = pretrained.load(config, device, companion=config.mc)
    mc = load_for_inference(source, meta, device, config.megacontext, model) if config.mc else None
    name = f"{source}_{meta['model_tag']}_{meta['step']:06d}{'_mc' if mc else ''}"
    with autocast(device, resolve_dtype(config.dtype, device.type)):
        sessions = SessionScorer(session_maker(model, *mc)) if mc else None
        results = simple_evaluate(
            HarnessLM(model, tokenizer, name, config.batch_size, sessions),
            tasks=manager.match_tasks(wanted),
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.chat,
            gen_kwargs=config.gen_kwargs or None,
            bootstrap_iters=1000,  # iterations for the standard errors; the default takes a minute
            task_manager=manager,
            log_samples=False,
        )
    print(make_table(results))
    path = get_base_dir() / "lm_eval" / f"{name}.json"
    kept = {key: results[key] for key in ("results", "versions", "n-shot", "n-samples")}
    with atomic_write(path, "w") as file:
        json.dump({**kept, "options": asdict(config)}, file, indent=2, default=str)
    print(f"written to {path}")
    scores = {
        f"{task}, {metric.removesuffix(',none')}": value
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float) and "stderr" not in metric
    }
    facts = {"Model": f"{meta['model_tag']} (step {meta['step']:,})", "Examples per task (at most)": config.limit}
    get_report().log(f"Harness evaluation {source}{' with MegaContext' if mc else ''}", [facts, scores])


if __name__ == "__main__":
    run(main, Config)
