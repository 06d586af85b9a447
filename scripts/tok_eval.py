"""
Compare how well our tokenizer compresses several kinds of text with the vocabularies of GPT-2 and GPT-4.

    python -m scripts.tok_eval
"""

import threading
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from rich.table import Table

from nanochat.common import UserError
from nanochat.configurator import run
from nanochat.dataset import iter_documents
from nanochat.ranges import Range
from nanochat.report import get_report
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

NEWS = """The harbour council voted on Tuesday to reopen the old ferry line between the two islands, ending an
eleven-year argument over costs. "We lost a generation of visitors," said its chair, Marta Lindqvist, who
expects 40,000 passengers in the first summer. Critics note that the new boats, bought second-hand for $3.2
million, still need certification, and that the pier was last inspected in 2009."""

KOREAN = """지난 화요일, 항구 위원회는 두 섬을 잇는 옛 여객선 노선을 다시 열기로 결정했다. 위원장은 첫 여름에만 약
사만 명의 승객이 이용할 것으로 기대한다고 말했다. 그러나 새로 사들인 배는 아직 검사를 받아야 한다."""

CODE = '''def moving_average(values: list[float], window: int) -> list[float]:
    """Mean of each run of `window` values."""
    if window < 1:
        raise ValueError(f"window must be positive, got {window}")
    total, result = sum(values[: window - 1]), []
    for i in range(window - 1, len(values)):
        total += values[i]
        result.append(total / window)
        total -= values[i - window + 1]
    return result
'''

MATH = r"""Let $f: [0, 1] \to \mathbb{R}$ be continuous with $f(0) = f(1)$. Then there is an
$x \in [0, \tfrac12]$ such that $f(x) = f(x + \tfrac12)$. \emph{Proof.} Put
$g(x) = f(x) - f(x + \tfrac{1}{2})$. Since $g(0) + g(\tfrac12) = 0$, the intermediate value theorem gives a
root: $\int_0^1 f'(t)\,dt = \sum_{k=1}^{n} \left(f(\tfrac{k}{n}) - f(\tfrac{k-1}{n})\right) = 0. \qed$"""

SCIENCE = """Chloroplasts capture light with chlorophyll a and b, whose absorption peaks lie near 430 nm and 662 nm.
The energy drives electrons through photosystems II and I; the resulting proton gradient across the thylakoid
membrane powers ATP synthase, while NADP+ is reduced to NADPH for the Calvin–Benson cycle."""


@dataclass
class Config:
    download_timeout: Annotated[float, Range(0.001, 86400)] = 30.0
    """seconds to wait for the download of each vocabulary, of GPT-2 and of GPT-4"""


def fetch_reference(name, timeout) -> RustBPETokenizer | None:
    """One of OpenAI's vocabularies, downloaded or from tiktoken's cache; None if that fails or takes too long."""
    found = []

    def fetch():
        try:
            found.append(RustBPETokenizer.from_pretrained(name))
        except OSError as error:  # those of `requests` are OSErrors too
            print(f"the vocabulary {name} is not available ({type(error).__name__}): left out of the comparison")

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        print(f"the vocabulary {name} did not arrive within {timeout:g} s: left out of the comparison")
    return found[0] if found else None


def main(config: Config):
    ours = get_tokenizer()
    texts = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}
    for split in ("train", "val"):
        texts[f"{split} split"] = "\n".join(next(iter_documents(split)))
    references = {
        "GPT-2": fetch_reference("gpt2", config.download_timeout),
        "GPT-4": fetch_reference("cl100k_base", config.download_timeout),
    }
    tokenizers = {"ours": ours} | {name: t for name, t in references.items() if t is not None}
    for name, text in texts.items():
        if ours.decode(ours.encode(text)) != text:
            raise UserError(f"the tokenizer does not give back the text {name!r}: train it again")

    sizes = ", ".join(f"{name} {t.get_vocab_size():,}" for name, t in tokenizers.items())
    missing = [name for name, tokenizer in references.items() if tokenizer is None]
    header = ["text", "bytes", *(f"{name} (bytes/token)" for name in tokenizers)]
    rows = []
    for name, text in texts.items():
        size = len(text.encode())
        rows.append([name, f"{size:,}", *(f"{size / len(t.encode(text)):.2f}" for t in tokenizers.values())])

    table = Table(*header, title=f"Compression: bytes per token, higher is better (vocabularies: {sizes})")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    markdown = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])
    note = f"Not compared, because not available: {', '.join(missing)}." if missing else None
    get_report().log(section="Tokenizer evaluation", data=[f"Vocabularies: {sizes}.", markdown, note])


if __name__ == "__main__":
    run(main, Config)
