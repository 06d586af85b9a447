"""
A task is a list of conversations that can score an answer. Mixtures and sequences of tasks are lists too.

A conversation is {"messages": [{"role": "system"|"user"|"assistant", "content": …}, …], …}. Content is a string
or, for an assistant that uses its tool, a list of parts {"type": "text"|"python"|"python_output", "text": str}.
"""

import random
import re
from decimal import Decimal, InvalidOperation

MIX_SEED = 42


class Task:
    """
    Conversations `start`, `start + step`, … below `stop` of a dataset, as range() counts.

    A subclass says how many there are in all (num_examples), gives one by its number (get_example), and scores an
    answer to it (evaluate). A "generative" task is answered in free text, a "categorical" one by one of the
    conversation's "letters".
    """

    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise ValueError(f"expected 0 <= start <= stop and step >= 1, got {start}, {stop}, {step}")
        self.slice = slice(start, stop, step)

    def num_examples(self) -> int:
        raise NotImplementedError(f"{type(self).__name__} must say how many examples there are")

    def get_example(self, index: int) -> dict:
        raise NotImplementedError(f"{type(self).__name__} must give an example")

    def evaluate(self, conversation: dict, assistant_response: str) -> bool:
        """Whether the response answers the conversation's last question."""
        raise NotImplementedError(f"{type(self).__name__} has no right answers")

    def _numbers(self):
        return range(self.num_examples())[self.slice]

    def __len__(self):
        return len(self._numbers())

    def __getitem__(self, index: int) -> dict:
        return self.get_example(self._numbers()[index])


class GeneratedTask(Task):
    """`size` conversations that are made from their numbers. split: "train" or "test", which share no seed."""

    def __init__(self, size: int, split: str, **slicing):
        super().__init__(**slicing)
        if split not in ("train", "test"):
            raise ValueError(f"expected split 'train' or 'test', got {split!r}")
        self.size, self.split = size, split

    def num_examples(self):
        return self.size

    def random(self, index) -> random.Random:
        return random.Random(f"{type(self).__name__} {self.split} {index}")


class TaskMixture(Task):
    """All conversations of several tasks in one fixed random order. A task given twice comes twice."""

    def __init__(self, tasks, **slicing):
        super().__init__(**slicing)
        self.tasks = list(tasks)
        self.pairs = [(number, index) for number, task in enumerate(self.tasks) for index in range(len(task))]
        random.Random(MIX_SEED).shuffle(self.pairs)

    def num_examples(self):
        return len(self.pairs)

    def get_example(self, index):
        number, index = self.pairs[index]
        return self.tasks[number][index]


class TaskSequence(Task):
    """The conversations of several tasks one task after the other, as for a curriculum."""

    def __init__(self, tasks, **slicing):
        super().__init__(**slicing)
        self.tasks = list(tasks)

    def num_examples(self):
        return sum(len(task) for task in self.tasks)

    def get_example(self, index):
        for task in self.tasks:
            if index < len(task):
                return task[index]
            index -= len(task)
        raise IndexError(f"index past the end by {index + 1}")


def render_mc(question: str, letters, choices) -> str:
    """
    A multiple choice question as a prompt.

    The letter follows its choice, where small models bind it best, directly after "=", so that it is
    the same token as the bare letter of the answer.
    """
    lines = "".join(f"- {choice}={letter}\n" for letter, choice in zip(letters, choices, strict=True))
    return f"Multiple Choice question: {question}\n{lines}\nRespond only with the letter of the correct answer."


def last_text(conversation: dict) -> str:
    """The last text of the conversation's last message: where the reference answer is."""
    content = conversation["messages"][-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def number_after(marker: str, text: str) -> Decimal | None:
    """The number after the last `marker` that has one ("#### 1,200." → 1200); None when there is none."""
    found = re.findall(rf"{re.escape(marker)}\s*(-?[0-9][0-9,]*(?:\.[0-9]+)?)", text)
    try:
        return Decimal(found[-1].replace(",", "")) if found else None
    except InvalidOperation:  # more digits than a decimal can have
        return None


class NumberTask(Task):
    """A task whose answers end in a number behind `marker`; the number decides."""

    marker = "####"

    def evaluate(self, conversation, assistant_response):
        reference = number_after(self.marker, last_text(conversation))
        if reference is None:
            raise ValueError(f"the reference answer has no number after {self.marker!r}: {last_text(conversation)!r}")
        return number_after(self.marker, assistant_response) == reference

    def reward(self, conversation, assistant_response) -> float:
        """What reinforcement learning maximizes: 1 for the right number."""
        return float(self.evaluate(conversation, assistant_response))
