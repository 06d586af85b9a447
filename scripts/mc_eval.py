"""
How much of its context a model with MegaContext keeps when it reads gists instead of tokens.

    python -m scripts.mc_eval                       # the deepest base model trained with --mc
    python -m scripts.mc_eval -i sft --ratios 8,32
    python -m scripts.mc_eval --max_seq_len 4096    # sequences longer than in training

On validation text, always scored on the same newest tokens: context gain recovered by compression ratio and by
distance, and the loss at each level of detail, with controls (truncated history, gists of another text, means in place
of GistNet); the value of a past many times as long as gists; and how many tokens of a block can be reconstructed. On
recall documents also: how often an answer is found when LensNet, other policies or an oracle choose the open blocks.
With --stream_tokens: the cost of a session of that length. With --ruler_lengths: RULER's tasks, at any length.
Tables and plots go to the report, all figures to $NANOCHAT_BASE_DIR/mc_eval/<source>_<tag>_<step>.json.
"""

import json
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal

import torch

from megacontext.evaluation.context_gain import Evaluator, mean_gist
from megacontext.evaluation.figures import plot_context_gain, plot_focus, plot_stream
from megacontext.evaluation.policies import focus_by_length
from megacontext.evaluation.reconstruction import reconstruction_accuracy
from megacontext.evaluation.ruler import TASKS, recall_tasks, ruler
from megacontext.evaluation.stream_cost import STEPS_IN_INTERVALS, stream_cost
from megacontext.inference import MCInference, load_for_inference, session_maker
from megacontext.reader import Reader
from megacontext.session import MCSession
from nanochat import pretrained
from nanochat.common import (
    UserError,
    atomic_write,
    autocast,
    compute_init,
    get_base_dir,
    print0,
    resolve_dtype,
)
from nanochat.configurator import group, run, short
from nanochat.dataloader import TokenLoader
from nanochat.dataset import get_data_dir, list_row_groups, read_row_group, read_source
from nanochat.engine import Engine
from nanochat.options import DeviceOptions
from nanochat.pretrained import PretrainedOptions
from nanochat.ranges import Count, CountOr0, Range
from nanochat.report import format_value, get_report
from nanochat.tokenizer import count_token_bytes

HEADS = {  # column titles of the tables, where the figure's name is not clear enough
    "first_token_s": "first token, s",
    "next_turn_ms": "next turn, ms",
    "token_ms": "ms per token",
    "tree_mb": "tree, MiB",
    "cache_mb": "cache, MiB",
    "natural": "text",
    "noise": "random tokens",
    "standard_error": "± standard error",
    "told": "gain over another text's",
    "told_standard_error": "± its standard error",
    "level": "LOD",
    "nearest": "from",
    "farthest": "to",
    "mean": "means",
    "truncated": "window",
    "sinks": "sinks + window",
    "bm25": "BM25",
    "lens": "LensNet",
    "regret": "regret, nats",
}
LEFT_OUT = {"sequences", "budget", "none_recovered", "sinks_recovered", "bm25_recovered"}  # of the tables
WORTH_KEEPING = 0.1  # nats per token that the history must be worth for a verdict


@dataclass
class Config(PretrainedOptions, DeviceOptions):
    source: Annotated[str, short("-i")] = "base"
    """stage of the model: base, mid, sft or rl"""
    max_seq_len: Count = -1
    """tokens per sequence; -1 for the context length of the model"""
    sequences: Count = 256
    """number of sequences"""
    device_batch_size: Annotated[int, Range(2)] = 8
    """sequences per batch; at least 2, since a control exchanges their gists"""
    ratios: str = "4,8,16,32"
    """compression ratios of the history, separated by commas; those that are out of reach are left out"""
    recall: CountOr0 = 128
    """questions per length in recall_lengths, if the data was made by nanochat.dataset --source recall; 0 for none"""
    recall_lengths: str = ""
    """lengths in tokens of the texts with these questions, separated by commas; empty for 0.5, 1, 2 and 4 times
    max_seq_len"""
    past: str = "1,10"
    """lengths of a past that is read as gists before max_seq_len tokens, as multiples of max_seq_len, separated by
    commas; empty for none"""
    ruler_lengths: str = ""
    """lengths in tokens at which to run RULER's tasks, separated by commas; empty for none"""
    ruler_words: Literal["ruler", "recall"] = "ruler"
    """RULER's own tasks, or questions like those of recall documents, for small models trained on these"""
    ruler_samples: Count = 20
    """questions per task and length"""
    open_blocks: Count = 2
    """number of open blocks that each policy chooses for a recall question"""
    stream_tokens: CountOr0 = 0
    """grow a session to this many tokens and measure its cost; 0 for none"""
    probe_steps: CountOr0 = 300
    """training steps of the decoder that reconstructs blocks from gists; 0 to skip it"""
    megacontext: Annotated[MCInference, group] = field(default_factory=MCInference)
    """settings of inference to evaluate with"""


def numbers(option, text, least=2) -> list[int]:
    """ "4,8" → [4, 8]; UserError for anything else."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--{option}: expected whole numbers such as 4,8,16,32, got {text!r}") from error
    if min(values) < least:
        raise UserError(f"--{option}: expected numbers of {least} or more, got {text!r}")
    return values


def head(key) -> str:
    for suffix in ("recovered", "kept"):
        if key.endswith(f"_{suffix}"):
            return f"{head(key.removesuffix(f'_{suffix}'))} {suffix}"
    return HEADS.get(key, key.replace("_", " "))


def table(title, rows) -> str:
    """Markdown; losses in nats per token, shares in percent with their standard error."""

    def is_shown(key):  # errors stand beside what they are of
        is_error = key.endswith("_error") and key.removesuffix("_error") in rows[0]
        return key not in LEFT_OUT and not key.endswith("_nll") and not is_error

    keys = [key for key in rows[0] if is_shown(key)]
    lines = [f"### {title}\n", "| " + " | ".join(map(head, keys)) + " |", "|" + " ---: |" * len(keys)]
    for row in rows:
        cells = [
            f"{100 * row[key]:.1f} ± {100 * row[f'{key}_error']:.1f}%"
            if f"{key}_error" in row and row[key] is not None
            else format_value(row[key])
            for key in keys
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def what_gists_keep(rows) -> str:
    """A sentence on how much of the history gists keep, compared with controls of as many entries, from `by_ratio`."""
    gain, entries = rows[0]["none"] - rows[0]["full"], listed([row["entries"] for row in rows])
    if rows[0]["gists_kept"] is None or gain < WORTH_KEEPING:
        return (
            f"The whole history is worth {gain:.2f} nats per token to this model, less than {WORTH_KEEPING} or not "
            "significantly above 0: too little to say what gists keep of it."
        )

    def kept(name):
        return listed([round(100 * row[f"{name}_kept"]) for row in rows]) + "%"

    return (
        f"Of the {gain:.2f} nats per token that all of the history is worth, gists keep {kept('gists')} (± "
        f"{max(100 * row['gists_kept_error'] for row in rows):.0f}) at {listed([row['ratio'] for row in rows])} times "
        f"compression, gists of another text {kept('shuffled')}, and a window of as many entries ({entries}) "
        f"{kept('truncated')}."
    )


def listed(values) -> str:
    """[8, 16, 32] → "8, 16 and 32"."""
    *first, last = (f"{value:,}" for value in values)
    return f"{', '.join(first)} and {last}" if first else last


def main(config: Config):
    *_, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    ratios = numbers("ratios", config.ratios)
    source, model, tokenizer, meta = pretrained.load(config, device, companion=True)
    networks, mc = load_for_inference(source, meta, device, config.megacontext, model)
    T = model.config.sequence_len if config.max_seq_len == -1 else config.max_seq_len
    if not mc.allocator_recent_tokens + mc.block_size <= T <= model.max_seq_len:
        raise UserError(
            f"max_seq_len: expected {mc.allocator_recent_tokens + mc.block_size} (the newest tokens and a block) to "
            f"{model.max_seq_len}, got {T}"
        )
    reader = Reader(model, networks, mc)
    B = config.device_batch_size
    steps = -(-config.sequences // B)

    tables = []

    def shown(title, rows):
        tables.append(table(title, rows))
        print0(tables[-1])
        return rows

    def measured(method, tokens=T):
        with TokenLoader(tokenizer, B, tokens, "val", device) as batches, autocast(device, dtype):
            return method(Evaluator(reader, batches, steps))

    like = recall_sizes() if config.recall > 0 else None
    lengths = numbers("recall_lengths", config.recall_lengths) if config.recall_lengths else [T // 2, T, 2 * T, 4 * T]
    shortest, longest = mc.allocator_recent_tokens + 2 * mc.block_size, model.max_seq_len
    lengths = [length for length in lengths if shortest <= length <= longest]
    if like and not lengths:
        raise UserError(f"--recall_lengths: expected lengths from {shortest} to {longest}, got {config.recall_lengths}")
    pasts = numbers("past", config.past, 1) if config.past else []
    ruler_lengths = numbers("ruler_lengths", config.ruler_lengths) if config.ruler_lengths else []
    if config.stream_tokens > 0 or ruler_lengths:
        mc.check_session(T)
    figures = {
        "by_ratio": shown("By compression of the history", measured(lambda e: e.by_ratio(ratios))),
        "by_distance": shown("By distance of the compressed part (tokens ago)", measured(Evaluator.by_distance)),
        "by_level": shown("The whole history at one level", measured(Evaluator.by_level)),
    }
    verdict = what_gists_keep(figures["by_ratio"])
    print0(verdict + "\n")
    if pasts:
        rows = [measured(lambda e: e.past(T), (1 + times) * T) for times in pasts]
        figures["past"] = shown(f"What came before {T:,} tokens, as gists or dropped", rows)
    if config.probe_steps > 0:
        rows = reconstruction(config, tokenizer, reader, dtype, T)
        figures["reconstruction"] = shown("Tokens of a block read back from its gist", rows)
    if like:
        with autocast(device, dtype):
            figures["focus"] = focus_by_length(
                reader,
                tokenizer,
                count_token_bytes(tokenizer).to(device),
                lengths,
                config.recall,
                like,
                config.open_blocks,
                B,
            )
        shown("Answers found, by choice of the blocks at full detail", figures["focus"]["by_length"])
    if ruler_lengths:
        with autocast(device, dtype):
            readers = ruler_readers(model, tokenizer, networks, mc)
            ask = (recall_sizes() or {}).get("ask", True)
            tasks = TASKS if config.ruler_words == "ruler" else recall_tasks(ask)
            rows = ruler(tokenizer, readers, ruler_lengths, config.ruler_samples, local_lines(), tasks)
        figures["ruler"] = shown("RULER: answers found", rows)
    if config.stream_tokens > 0:
        with autocast(device, dtype):
            session = MCSession(model, networks, mc)
        figures["stream"] = stream_cost(session, stream(tokenizer, session, config.stream_tokens), doublings(config))
        shown("Cost of a growing stream", figures["stream"])

    facts = {
        "Model": f"{source} {meta['model_tag']}, step {meta['step']}",
        "Sequences": steps * B,
        "Tokens per sequence": T,
        "Scored tokens per sequence, the newest": max(1, mc.allocator_recent_tokens),
        "Tokens per gist": mc.block_size,
    }
    name = f"{source}_{meta['model_tag']}_{meta['step']:06d}"
    path = get_base_dir() / "mc_eval" / f"{name}.json"
    with atomic_write(path, "w") as file:
        json.dump({**facts, **figures}, file, indent=2)
    plot = plot_context_gain(figures["by_ratio"], figures["by_distance"], figures["by_level"])
    get_report().log(
        f"MegaContext evaluation {source}",
        [
            facts,
            f"{verdict}\n",
            "Losses in nats per token on the scored tokens. Recovered: share of the gain of the full history over one "
            "truncated to as many entries. Kept: the same, compared with no history.\n",
            *tables,
        ],
        plots={
            "Context gain": plot,
            **({"Focus": plot_focus(**figures["focus"])} if like else {}),
            **({"Stream": plot_stream(figures["stream"])} if "stream" in figures else {}),
        },
    )
    print0(f"all figures: {path}")


def doublings(config) -> list[int]:
    """Lengths to measure: 1,024 tokens, four times as many, and so on, up to stream_tokens."""
    lengths = [1024]
    while lengths[-1] * 4 < config.stream_tokens:
        lengths.append(lengths[-1] * 4)
    return [length for length in lengths if length < config.stream_tokens] + [config.stream_tokens]


def stream(tokenizer, session, n) -> list[int]:
    """n tokens of the training split, and the tokens that follow each measured length."""
    with TokenLoader(tokenizer, 1, n + 64 + STEPS_IN_INTERVALS * session.interval, "train") as batches:
        return next(batches)[0][0].tolist()


def ruler_readers(model, tokenizer, networks, mc) -> dict:
    """Readers for `ruler`: all tokens, if the model has positions for them; sessions without and with focus."""
    engine = Engine(model, tokenizer)

    def answer(ids, new_tokens, make_session=None):
        (said,), _ = engine.generate_batch(ids, max_tokens=new_tokens, temperature=0.0, make_session=make_session)
        return tokenizer.decode(said[len(ids) :])

    def full(ids, new_tokens):
        return answer(ids, new_tokens) if len(ids) + new_tokens <= model.max_seq_len else None

    def through(config):
        return partial(answer, make_session=session_maker(model, networks, config))

    closed = replace(mc, allocator_expand_threshold=1.0)  # nothing is opened
    return {"full": full, "gists": through(closed), "focus": through(mc)}


def local_lines() -> list[str]:
    """The lines of the first validation documents."""
    texts = read_row_group(*list_row_groups("val")[0])
    return [line for text in texts for line in text.splitlines() if line.strip()]


def recall_sizes() -> dict | None:
    """Sizes of the recall documents that the model was trained on; None for other data."""
    record = read_source(get_data_dir())
    return record.get("sizes") if record["source"] == "recall" else None


def reconstruction(config, tokenizer, reader, dtype, T) -> list[dict]:
    """Rows for GistNet and for plain means, on blocks of text and on random tokens."""
    device, K = reader.device, reader.config.block_size
    generator = torch.Generator(device).manual_seed(0)
    with ExitStack() as stack:

        def natural(split):
            batches = stack.enter_context(TokenLoader(tokenizer, config.device_batch_size, T, split, device))

            def sample(n):
                blocks = next(batches)[0][:, : T // K * K].reshape(-1, K)
                while len(blocks) < n:
                    blocks = torch.cat((blocks, next(batches)[0][:, : T // K * K].reshape(-1, K)))
                return blocks[torch.randperm(len(blocks), generator=generator, device=device)[:n]]

            return sample

        def noise(n):
            return torch.randint(tokenizer.get_vocab_size(), (n, K), generator=generator, device=device)

        samples = {"natural": (natural("train"), natural("val")), "noise": (noise, noise)}
        return [
            {"gist": name, **reconstruction_accuracy(reader.model, gist, samples, K, dtype, config.probe_steps)}
            for name, gist in {"GistNet": reader.gist, "mean": mean_gist}.items()
        ]


if __name__ == "__main__":
    run(main, Config)
