"""
GSM8K: grade-school word problems with worked solutions (Cobbe et al. 2021, arXiv:2110.14168).

The solutions mark their sums as <<48/2=24>>; each becomes a call of the calculator tool and its output. The last
line is "#### " and the answer.
"""

import re

from tasks.common import NumberTask
from tasks.hub import load_split

SUM = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


def solution_parts(answer: str) -> list[dict]:
    """A solution as parts: text, and python and python_output for each <<expression=result>>."""
    parts, end = [], 0
    for match in SUM.finditer(answer):
        parts.append({"type": "text", "text": answer[end : match.start()]})
        parts.append({"type": "python", "text": match[1]})
        parts.append({"type": "python_output", "text": match[2]})
        end = match.end()
    parts.append({"type": "text", "text": answer[end:]})
    return [part for part in parts if part["text"]]


class GSM8K(NumberTask):
    """subset: "main" or "socratic"; split: "train" or "test"."""

    def __init__(self, subset: str, split: str, **slicing):
        super().__init__(**slicing)
        if subset not in ("main", "socratic") or split not in ("train", "test"):
            raise ValueError(f"GSM8K has no subset {subset!r} with a split {split!r}")
        self.rows = load_split("openai/gsm8k", subset, split, ("question", "answer"))

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": solution_parts(row["answer"])},
        ]
        return {"messages": messages}
