"""ARC: grade-school science questions with three to five choices (Clark et al. 2018, arXiv:1803.05457)."""

from tasks.common import last_text, render_mc
from tasks.hub import HubTask


class ARC(HubTask):
    """subset: "ARC-Easy" or "ARC-Challenge"; split: "train", "validation" or "test"."""

    eval_type = "categorical"

    repo, columns = "allenai/ai2_arc", ("question", "choices", "answerKey")
    splits = dict.fromkeys(("ARC-Easy", "ARC-Challenge"), ("train", "validation", "test"))

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
