"""
GSM8K: grade-school word problems with worked solutions (Cobbe et al. 2021, arXiv:2110.14168).

The solutions mark their sums as <<48/2=24>>; each becomes a call of the calculator tool and its output. The last
line is "#### " and the answer.
"""

import re

from tasks.common import NumberTask
from tasks.hub import HubTask

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


class GSM8K(HubTask, NumberTask):
    """subset: "main" or "socratic"; split: "train" or "test"."""

    repo, columns = "openai/gsm8k", ("question", "answer")
    splits = dict.fromkeys(("main", "socratic"), ("train", "test"))

    def get_example(self, index):
        row = self.rows[index]
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": solution_parts(row["answer"])},
        ]
        return {"messages": messages}
