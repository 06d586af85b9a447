"""
Long-term recall in chats: long conversations in which facts are stated, and asked for much later.

The user sends the lines of a recall document (nanochat.recall), a few per message, and asks its questions; the last
message answers one. Models learn this from few facts that are asked for often, best after pretraining on such
documents. In the test split each fact is asked for once, at least a third of the conversation after it was stated, and
as many distracting facts are stated.
"""

import math
import random
import re

from nanochat.recall import FACTS, recall_document
from tasks.common import GeneratedTask, last_text

SHORTEST = 1200  # characters of a conversation
FACTS_ASKED = 4  # of a conversation
LINES = (3, 8)  # that the user tells at once
ACKNOWLEDGED = "I see."
VALUES = {value for values in FACTS.values() for value in values}


class Recall(GeneratedTask):
    """`size` conversations of SHORTEST to `chars` characters, log-uniform. split: "train" or "test"."""

    def __init__(self, size: int, split: str, chars: int = 6000, **slicing):
        super().__init__(size, split, **slicing)
        if chars < SHORTEST:
            raise ValueError(f"expected chars of {SHORTEST} or more, got {chars}")
        self.chars = chars

    def get_example(self, index):
        rng = random.Random(f"recall chat {self.split} {index}")
        chars = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(self.chars))))
        sizes = {"times": 4, "distractors": 0}
        if self.split == "test":
            sizes = {"times": 1, "distractors": FACTS_ASKED, "min_distance": chars // 3}
        text, questions = recall_document(
            rng, chars=chars, questions=FACTS_ASKED, tables=0, words=rng.randint(3, 16), **sizes
        )
        messages, told, done = [], [], 0

        def exchange(answer):
            messages.append({"role": "user", "content": "\n".join(told)})
            messages.append({"role": "assistant", "content": answer})
            told.clear()

        for question in questions:
            (start, end), stop = question.question, question.answer[1] + 1  # behind the full stop
            patience = rng.randint(*LINES)
            for line in text[done:start].splitlines():
                told.append(line)
                if len(told) == patience:
                    exchange(ACKNOWLEDGED)
            told.append(text[start:end])
            exchange(text[end:stop].strip())
            done = stop + 1
        return {"messages": messages}

    def evaluate(self, conversation, assistant_response):
        """Whether the first value that the response names is the right one."""
        named = [word for word in re.findall(r"\w+", assistant_response) if word in VALUES]
        return named[:1] == [last_text(conversation).rstrip(".").split()[-1]]
