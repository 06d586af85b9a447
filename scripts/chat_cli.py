"""
Chat with a model in the terminal.

    python -m scripts.chat_cli                        # the SFT model
    python -m scripts.chat_cli -i mid -t 0.2 -k 20
    python -m scripts.chat_cli -p "Who are you?"      # one answer
    python -m scripts.chat_cli <letter.txt            # one answer to the text of a file
    python -m scripts.chat_cli --mc --mc_show_focus   # conversations of any length, with a view of the focus
    python -m scripts.chat_cli --mc --stream library  # about a stream made by scripts.mc_stream
    python -m scripts.chat_cli --hf-path HuggingFaceTB/SmolLM2-135M-Instruct    # or a folder, or a .gguf file

Arrow keys edit the line and recall earlier ones. Ctrl-C stops an answer; Ctrl-D, "quit" or "exit" ends the program;
"clear" starts a new conversation.
"""

import secrets
import signal
import sys
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console

from megacontext.focus_strip import focus_strip
from megacontext.inference import InferenceOptions, about_stream, load_for_inference, session_maker
from megacontext.streams import gist_key_of
from nanochat import pretrained
from nanochat.common import UserError, autocast, compute_init, get_base_dir, resolve_dtype
from nanochat.configurator import run, short
from nanochat.engine import Engine
from nanochat.options import DeviceOptions
from nanochat.pretrained import PretrainedOptions
from nanochat.ranges import Count, CountOr0, Range
from nanochat.sources import decode_text
from nanochat.tokenizer import join_parts, stream_parts

STYLES = {"text": "", "python": "cyan", "python_output": "green"}
MARKS = {"python": ("[", ""), "python_output": (" = ", "] ")}  # a tool call is shown as [17 + 25 = 42]


@dataclass
class Config(PretrainedOptions, DeviceOptions, InferenceOptions):
    source: Annotated[str, short("-i")] = "sft"
    """stage of the model: mid, sft, rl or base"""
    prompt: Annotated[str, short("-p")] = ""
    """answer this prompt and exit"""
    temperature: Annotated[float, Range(0, 2), short("-t")] = 0.6
    """sampling temperature; 0 always takes the most likely token"""
    top_k: Annotated[CountOr0, short("-k")] = 50
    """sample from this many of the likeliest tokens; 0 for all"""
    max_tokens: Annotated[Count, short("-m")] = 256
    """tokens per answer, at most"""
    seed: CountOr0 = -1
    """random seed of the sampling; -1 for a different one each time"""
    mc_show_focus: bool = False
    """with --mc, show the conversation after each answer as a strip coloured by level of detail"""
    stream: str = ""
    """with --mc, name of a stream made by scripts.mc_stream that all conversations are about"""


class Stop:
    """Within this context Ctrl-C sets `asked` instead of raising KeyboardInterrupt."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def show(console, pieces, stop):
    """Print (type, text) pieces as they come, until they end or `stop` is set; returns the printed pieces."""
    shown, kind = [], "text"
    for now, text in pieces:
        if now != kind:
            closing, opening = MARKS.get(kind, ("", ""))[1], MARKS.get(now, ("", ""))[0]
            console.print(closing + opening, end="", style="dim", markup=False, highlight=False)
            kind = now
        console.print(text, end="", style=STYLES[kind], markup=False, highlight=False, soft_wrap=True)
        console.file.flush()
        shown.append((now, text))
        if stop.asked:
            break
    console.print(" (stopped)" if stop.asked else "", style="dim")
    return shown


def read_line():
    """A line from the user; None at the end of the input."""
    try:
        return input("\nUser: ").strip()
    except EOFError:
        return None
    except KeyboardInterrupt:  # at the prompt it discards the line
        return ""


def remember_lines():
    """Line editing and a history across sessions, if readline is available."""
    try:
        import readline
    except ImportError:  # not in all builds of Python; input works without it
        return
    import atexit

    path = get_base_dir() / "chat_history"
    if path.exists():
        readline.read_history_file(path)
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, path)


def main(config: Config):
    text = config.prompt
    if not text and not (sys.stdin and sys.stdin.isatty()):  # a pipe is read as one message
        text = decode_text(sys.stdin.buffer.read() if sys.stdin else b"", "standard input").strip()
        if not text:
            raise UserError("expected a message on the standard input, got none: type one in a terminal, or use -p")
    *_, device = compute_init(config.device_type)
    dtype = resolve_dtype(config.dtype, device.type)
    source, model, tokenizer, meta = pretrained.load(config, device, companion=config.mc)
    engine, console = Engine(model, tokenizer), Console(highlight=False)
    context, make_session = model.config.sequence_len, None
    if config.mc:
        networks, settings = load_for_inference(source, meta, device, config.megacontext, model)
        with autocast(device, dtype):
            make_session = session_maker(model, networks, settings)
        if config.stream:
            gist_key = gist_key_of(source, meta, tokenizer, settings)
            make_session = about_stream(make_session, config.stream, gist_key, device)
    elif config.stream:
        raise UserError("--stream: expected --mc with it, since the model alone cannot read so much")
    messages, answers = [], 0

    def seed():
        return config.seed + answers if config.seed >= 0 else secrets.randbits(63)

    session = make_session(seed=seed()) if make_session else None  # one per conversation

    def answer(text):
        """Add the user's text and the model's answer to the conversation."""
        nonlocal answers
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.render_for_completion({"messages": messages})
        room = config.max_tokens if session else context - len(prompt)
        if room < 1:
            messages.pop()
            raise UserError(
                f"the conversation has {len(prompt):,} tokens and the model reads {context:,}: "
                "type clear for a new one, or write a shorter message"
            )
        columns = engine.generate(
            prompt,
            max_tokens=min(config.max_tokens, room),
            temperature=config.temperature,
            top_k=config.top_k,
            seed=seed(),
            session=session,
        )
        try:
            with Stop() as stop, autocast(device, dtype):
                shown = show(console, stream_parts(tokenizer, columns), stop)
        except UserError:  # it does not fit into the session
            messages.pop()
            raise
        columns.close()
        answers += 1
        messages.append({"role": "assistant", "content": join_parts(shown)})
        if session and config.mc_show_focus:
            console.print(focus_strip(session.focus_state(), console.width))

    if text:
        answer(text)
        return
    size = f"working context of {session.budget:,} entries" if session else f"context of {context:,} tokens"
    console.print(f"{source} {meta['model_tag']}, step {meta['step']}; {size}")
    console.print("clear: new conversation; quit or Ctrl-D: end; Ctrl-C stops an answer", style="dim")
    remember_lines()
    while True:
        line = read_line()
        if line is None or line.lower() in ("quit", "exit"):
            console.print("Goodbye!")
            return
        if line.lower() == "clear":
            messages.clear()
            if session:
                session.close()
                session = make_session(seed=seed())
            console.print("A new conversation.", style="dim")
        elif line:
            console.print("\nAssistant: ", end="", style="bold")
            try:
                answer(line)
            except UserError as error:
                console.print(f"error: {error}", style="red")


if __name__ == "__main__":
    run(main, Config)
