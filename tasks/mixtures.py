"""
Which tasks each stage trains and is evaluated on.

"full" are the fork point's mixtures, from the Hugging Face hub. The others need no network and are sized for a CPU:
"local" teaches a small model who it is, to use the calculator, and to spell; "recall" to answer from what was said long
before, for which MegaContext is; "memory" is both, with shorter chats.
"""

from functools import partial
from typing import Literal

from nanochat.common import get_base_dir, print0
from tasks.arc import ARC
from tasks.arithmetic import Arithmetic
from tasks.common import NumberTask, Task, TaskMixture
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.recall_chats import Recall
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.words import NoWords

Tasks = Literal["full", "local", "recall", "memory"]
# How many conversations of each kind the generated mixtures have; identity is a count of passes over its file.
SIZES = {
    "mid": {"identity": 2, "sums": 12_000, "spelling": 8_000, "counting": 2_000, "memory": 2_500, "recall": 20_000},
    "sft": {"identity": 1, "sums": 1_200, "spelling": 1_200, "counting": 300, "memory": 500, "recall": 2_000},
    "val": {"identity": 0, "sums": 300, "spelling": 60, "counting": 40, "memory": 100, "recall": 200},
}
LOCAL_RL = 2_000
MEMORY_CHARS = 2000  # of the chats of "memory", at most
TWO_STEPS = 0.1  # share of the sums in training

# Accuracy of guessing, for ChatCORE = mean of (accuracy - baseline) / (1 - baseline).
BASELINES = {
    "ARC-Easy": 0.25,
    "ARC-Challenge": 0.25,
    "MMLU": 0.25,
    "GSM8K": 0.0,
    "HumanEval": 0.0,
    "SpellingBee": 0.0,
    "Arithmetic": 0.0,
    "Recall": 0.155,  # the value of any of the names told
}


def _identity():
    return CustomJSON(get_base_dir() / "identity_conversations.jsonl")


def _spelling(spelling, counting, split="train", words="large", start=0):
    """The two tasks on letters, or none, with a line that says so, when there are no words."""
    try:
        return [
            SimpleSpelling(start + spelling, split, words=words, start=start),
            SpellingBee(start + counting, split, words=words, start=start),
        ]
    except NoWords as error:
        print0(f"spelling is left out: {error}")
        return []


def _generated(which, stage):
    """The mixtures that need no network. Stages have different examples: those of "sft" come after those of "mid"."""
    sizes, before = SIZES[stage], SIZES["mid"] if stage == "sft" else dict.fromkeys(SIZES["mid"], 0)
    split = "test" if stage == "val" else "train"

    def recall(kind, **chars):
        return Recall(before[kind] + sizes[kind], split, start=before[kind], **chars)

    if which == "recall":
        return recall("recall")
    start = before["sums"]  # there are more of them than of the others
    sums = Arithmetic(start + sizes["sums"], split, two_steps=0 if split == "test" else TWO_STEPS, start=start)
    spelling = _spelling(sizes["spelling"], sizes["counting"], split, "text", start)
    identity = [_identity()] * sizes["identity"] if sizes["identity"] else []
    local = TaskMixture([*identity, sums, *spelling])
    return TaskMixture([local, recall("memory", chars=MEMORY_CHARS)]) if which == "memory" else local


def mid_mixture(which: str) -> Task:
    """Training conversations of midtraining. Raises UserError if their data is not available."""
    if which != "full":
        return _generated(which, "mid")
    identity = _identity()  # first, since it is quick to find missing
    tasks = [
        SmolTalk("train"),
        MMLU("auxiliary_train", "train"),
        GSM8K("main", "train"),
        identity,
        identity,
        *_spelling(200_000, 80_000),
    ]
    return TaskMixture(tasks)


def mid_val(which: str) -> Task:
    """Validation conversations of midtraining, in the proportions of the training mixture."""
    if which != "full":
        return _generated(which, "val")
    return TaskMixture([SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)])


def sft_mixture(which: str) -> Task:
    """Training conversations of supervised finetuning. Raises UserError if their data is not available."""
    if which != "full":
        return _generated(which, "sft")
    identity = _identity()
    tasks = [
        ARC("ARC-Easy", "train"),
        ARC("ARC-Challenge", "train"),
        GSM8K("main", "train"),
        SmolTalk("train", stop=10_000),
        identity,
        *_spelling(300, 300),
    ]
    return TaskMixture(tasks)


def sft_val(which: str) -> Task:
    """Validation conversations of supervised finetuning."""
    return SmolTalk("test") if which == "full" else mid_val(which)


def rl_tasks(which: str) -> tuple[NumberTask, NumberTask]:
    """(problems to train on, problems to evaluate on) of reinforcement learning."""
    if which == "local":
        sums = {"two_steps": 0.2, "max_operand": 999}  # harder than those before: there must be something to gain
        return Arithmetic(LOCAL_RL, "train", **sums), Arithmetic(LOCAL_RL, "test", **sums)
    return GSM8K("main", "train"), GSM8K("main", "test")


def eval_tasks(which: str) -> dict:
    """Name -> constructor of the tasks that chat_eval scores; BASELINES has the accuracy of guessing."""
    if which != "full":
        tasks = {} if which == "recall" else {"Arithmetic": partial(Arithmetic, 256, "test")}
        if tasks and _spelling(1, 1, "test", words="text"):
            tasks["SpellingBee"] = partial(SpellingBee, 128, "test", words="text")
        return tasks if which == "local" else {**tasks, "Recall": partial(Recall, 128, "test")}
    return {
        "ARC-Easy": partial(ARC, "ARC-Easy", "test"),
        "ARC-Challenge": partial(ARC, "ARC-Challenge", "test"),
        "MMLU": partial(MMLU, "all", "test"),
        "GSM8K": partial(GSM8K, "main", "test"),
        "HumanEval": HumanEval,
        "SpellingBee": partial(SpellingBee, 256, "test"),
    }
