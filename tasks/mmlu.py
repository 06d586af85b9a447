"""MMLU: four-choice questions on 57 subjects (Hendrycks et al. 2020, arXiv:2009.03300)."""

from typing import ClassVar

from tasks.common import last_text, render_mc
from tasks.hub import HubTask

LETTERS = ("A", "B", "C", "D")


class MMLU(HubTask):
    """subset "all" with split "dev", "validation" or "test"; subset "auxiliary_train" with split "train"."""

    eval_type = "categorical"

    repo = "cais/mmlu"
    splits: ClassVar = {"all": ("dev", "validation", "test", "auxiliary_train"), "auxiliary_train": ("train",)}

    def get_example(self, index):
        row = self.rows[index]
        row = row.get("train", row)  # auxiliary_train has each row inside one column of that name
        messages = [
            {"role": "user", "content": render_mc(row["question"], LETTERS, row["choices"])},
            {"role": "assistant", "content": LETTERS[row["answer"]]},
        ]
        return {"messages": messages, "letters": LETTERS, "subject": row["subject"]}

    def evaluate(self, conversation, assistant_response):
        return assistant_response == last_text(conversation)
