"""
Evaluate a chat model on tasks.

    python -m scripts.chat_eval -i sft                       # all tasks
    python -m scripts.chat_eval -- -i mid -a 'ARC-Easy|GSM8K'
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft
    python -m scripts.chat_eval -i sft --tasks=local         # tasks generated on this machine, for small models
    python -m scripts.chat_eval -i sft --mc                  # generate answers through a working context
    python -m scripts.chat_eval -i sft --mc --compare        # and without it, from all tokens

ChatCORE summarizes all tasks: 0 for guessing, 1 for perfect.
"""

import random
from dataclasses import asdict, dataclass
from typing import Annotated

from megacontext.inference import InferenceOptions, load_for_inference, session_maker
from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, autocast, compute_init, print0, resolve_dtype
from nanochat.configurator import OptionalInt, run, short
from nanochat.engine import Engine
from nanochat.execution import SandboxUnavailable, find_sandbox
from nanochat.loop import ProgressLine
from nanochat.options import DeviceOptions, ModelOptions
from nanochat.ranges import Amount, Count, CountOr0, Range
from nanochat.report import fenced, get_report
from tasks.mixtures import Tasks, eval_tasks
from tasks.scoring import chat_core, evaluate

QUESTIONS = ["Who are you?", "What can you do?", "What is 17 + 25?", "Spell the word: window"]


@dataclass
class Config(ModelOptions, DeviceOptions, InferenceOptions):
    source: Annotated[str, short("-i")] = "sft"
    """stage of the model: mid, sft, rl or base"""
    task_name: Annotated[str, short("-a")] = ""
    """tasks, separated by |; empty for all"""
    tasks: Tasks = "full"
    """set of tasks: full (datasets of the hub), local, recall, or memory (local and recall)"""
    temperature: Annotated[Amount, short("-t")] = 0.0
    """sampling temperature of generated answers"""
    max_new_tokens: Annotated[Count, short("-m")] = 512
    """tokens per answer, at most"""
    num_samples: Annotated[Count, short("-n")] = 1
    """answers per problem, which counts as solved if one of them is right"""
    top_k: Annotated[CountOr0, short("-k")] = 50
    """sample from this many of the likeliest tokens; 0 for all"""
    batch_size: Annotated[Count, short("-b")] = 8
    """multiple choice questions per batch"""
    max_problems: Annotated[OptionalInt, Range(1, or_minus_one=True), short("-x")] = None
    """problems per task, at most; -1 for all"""
    mc: bool = False
    """generate with MegaContext; multiple choice questions are always read without it"""
    compare: bool = False
    """with --mc: answer without it, too, and show the answers side by side"""


def transcript(scores, tokenizer) -> str:
    """Sample answers for the report, including tool calls. scores: label of the kind of context → Score."""
    parts = []
    for samples in zip(*(score.samples for score in scores.values()), strict=True):
        conversation = samples[0][0]
        lines = [conversation["messages"][-2]["content"]]
        if len(conversation["messages"]) > 2:
            lines[0] += f"   (the end of a chat of {len(tokenizer.render_for_completion(conversation)):,} tokens)"
        for label, (_, answer, right) in zip(scores, samples, strict=True):
            lines.append(f"{label}→ {answer}   ({'right' if right else 'wrong'})")
        parts.append(fenced("\n".join(lines)))
    return "\n\n".join(parts)


def talk(model, tokenizer, make_session=None) -> str:
    """The model's answers to some common questions. make_session(seed=…): the session to generate with."""
    engine, parts = Engine(model, tokenizer), []
    for question in QUESTIONS:
        prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": question}]})
        rows, _ = engine.generate_batch(prompt, max_tokens=64, temperature=0.0, make_session=make_session)
        parts.append(fenced(f"{question}\n→ {tokenizer.decode(rows[0][len(prompt) :])}"))
    return "\n\n".join(parts)


def main(config: Config):
    _, rank, _, world_size, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    available = eval_tasks(config.tasks)
    names = [name.strip() for name in config.task_name.split("|")] if config.task_name else list(available)
    unknown = [name for name in names if name not in available]
    if unknown:
        raise UserError(f"unknown task {', '.join(unknown)}: --tasks {config.tasks} has {', '.join(available)}")
    if config.compare and not config.mc:
        raise UserError("--compare shows answers with and without MegaContext: add --mc, or leave it out")
    if "HumanEval" in names:
        try:
            find_sandbox()
        except SandboxUnavailable as error:
            if config.task_name:
                raise
            print0(f"HumanEval is left out: {error}")
            names.remove("HumanEval")
    tasks = {name: available[name]() for name in names}  # created now, so that missing data is reported at once
    model, tokenizer, meta = load_model(config.source, device, "eval", config.model_tag, config.step, config.mc)
    print0(f"model: {config.source} {meta['model_tag']}, step {meta['step']}")

    mc = load_for_inference(config.source, meta, device, config.megacontext, model) if config.mc else None

    facts = {"Model": f"{meta['model_tag']} (step {meta['step']})", **asdict(config)}
    del facts["megacontext"]  # shown with --mc only, and as the model has it
    facts |= asdict(mc[1]) if mc else {}
    accuracies, shown, transcripts = {}, {}, []
    with autocast(device, dtype):
        make_session = session_maker(model, *mc) if mc else None
        ways = {"": make_session}  # label → make_session for the answers
        if mc and config.compare:
            ways = {"with --mc ": make_session, "without --mc ": None}
        conversation = talk(model, tokenizer, make_session) if rank == 0 else ""
        for name, task in tasks.items():
            own = range(0, min(len(task), config.max_problems or len(task)), world_size)  # of the first rank
            samples = random.Random(f"{config.source} {name}").sample(own, min(3, len(own)))  # others in each stage
            scores = {}
            for label, make in ways.items():
                progress = ProgressLine(f"{name} {label}".strip(), None, unit="problem")
                score = scores[label] = evaluate(
                    task,
                    model,
                    tokenizer,
                    config.max_problems,
                    config.num_samples,
                    config.max_new_tokens,
                    config.temperature,
                    config.top_k,
                    config.batch_size,
                    keep=samples,
                    progress=lambda done, of, line=progress: line.update(done, f"of {of:,}", done / of),
                    make_session=make,
                )
                progress.close()
                title = name if make is make_session else f"{name} {label.strip()}"
                shown[title] = score.accuracy
                print0(f"{title}: {100 * score.accuracy:.2f}% ({score.passed:,} of {score.total:,})")
            accuracies[name] = shown[name]
            transcripts.append(f"### {name}\n\n{transcript(scores, tokenizer)}")
            results = dict(shown)
            if set(accuracies) == set(available):
                results["ChatCORE"] = chat_core(accuracies)
            sections = [results, facts, f"### Conversation\n\n{conversation}", *transcripts]
            get_report().log(section=f"Chat evaluation {config.source}", data=sections)  # the next task may fail
    if "ChatCORE" in results:
        print0(f"ChatCORE: {results['ChatCORE']:.4f}")
    print0(conversation)


if __name__ == "__main__":
    run(main, Config)
