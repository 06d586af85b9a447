"""ARC: grade-school science questions with three to five choices (Clark et al. 2018, arXiv:1803.05457)."""

from tasks.common import Task, last_text, render_mc
from tasks.hub import load_split


class ARC(Task):
    """subset: "ARC-Easy" or "ARC-Challenge"; split: "train", "validation" or "test"."""

    eval_type = "categorical"

    def __init__(self, subset: str, split: str, **slicing):
        super().__init__(**slicing)
        if subset not in ("ARC-Easy", "ARC-Challenge") or split not in ("train", "validation", "test"):
            raise ValueError(f"ARC has no subset {subset!r} with a split {split!r}")
        self.rows = load_split("allenai/ai2_arc", subset, split, ("question", "choices", "answerKey"))

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        row = self.rows[index]
        letters = row["choices"]["label"]  # usually A to D, sometimes 1 to 4
        messages = [
            {"role": "user", "content": render_mc(row["question"], letters, row["choices"]["text"])},
            {"role": "assistant", "content": row["answerKey"]},
        ]
        return {"messages": messages, "letters": letters}

    def evaluate(self, conversation, assistant_response):
        return assistant_response == last_text(conversation)
