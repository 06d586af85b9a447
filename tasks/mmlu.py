"""MMLU: four-choice questions on 57 subjects (Hendrycks et al. 2020, arXiv:2009.03300)."""

from tasks.common import Task, last_text, render_mc
from tasks.hub import load_split

LETTERS = ("A", "B", "C", "D")
SPLITS = {"all": ("dev", "validation", "test", "auxiliary_train"), "auxiliary_train": ("train",)}


class MMLU(Task):
    """subset "all" with split "dev", "validation" or "test"; subset "auxiliary_train" with split "train"."""

    eval_type = "categorical"

    def __init__(self, subset: str, split: str, **slicing):
        super().__init__(**slicing)
        if split not in SPLITS.get(subset, ()):
            raise ValueError(f"MMLU has no subset {subset!r} with a split {split!r}")
        self.rows = load_split("cais/mmlu", subset, split)

    def num_examples(self):
        return len(self.rows)

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
