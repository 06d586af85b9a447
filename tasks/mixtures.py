"""
Which tasks each stage trains and is evaluated on.

"full" are the fork point's mixtures, from the Hugging Face hub. The others need no network and are sized for a CPU:
"local" teaches a small model who it is, to use the calculator, and to spell; "recall" to answer from what was said long
before, for which MegaContext is; "memory" is both, with shorter chats.
"""

from functools import partial

from nanochat.common import UserError, get_base_dir, print0
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

# How many conversations of each kind the local mixtures have; identity is a count of passes over its file.
LOCAL_MID = {"arithmetic": 12_000, "spelling": 8_000, "counting": 2_000, "identity": 2}
LOCAL_SFT = {"arithmetic": 1_200, "spelling": 1_200, "counting": 300, "identity": 1}
LOCAL_VAL = {"arithmetic": 300, "spelling": 60, "counting": 40}
LOCAL_RL = 2_000
RECALL = {"mid": 20_000, "sft": 2_000, "val": 200}
MEMORY = {"mid": 2_500, "sft": 500, "val": 100}
MEMORY_CHARS = 2000  # of its chats in training, at most
LOCAL_TWO_STEPS = 0.1  # share of the sums in training

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


def _check(which, known=("full", "local", "recall", "memory")):
    if which not in known:
        raise UserError(f"expected --tasks {' or '.join(known)}, got {which!r}")


def _memory(stage, others):
    """The local mixture and chats that ask for what was said before; those of "sft" are others than those of "mid"."""
    if stage == "val":
        return TaskMixture([others, Recall(MEMORY["val"], "test", chars=MEMORY_CHARS)])
    start = MEMORY["mid"] if stage == "sft" else 0
    return TaskMixture([others, Recall(start + MEMORY[stage], "train", chars=MEMORY_CHARS, start=start)])


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


def _local(sizes, start=0):
    """The local mixture; `start` numbers its procedural examples, so that two stages see different ones."""
    sums = Arithmetic(start + sizes["arithmetic"], "train", two_steps=LOCAL_TWO_STEPS, start=start)
    spelling = _spelling(sizes["spelling"], sizes["counting"], words="text", start=start)
    return TaskMixture([*[_identity()] * sizes["identity"], sums, *spelling])


def _local_val():
    return TaskMixture(
        [
            Arithmetic(LOCAL_VAL["arithmetic"], "test"),
            *_spelling(LOCAL_VAL["spelling"], LOCAL_VAL["counting"], "test", words="text"),
        ]
    )


def mid_mixture(which: str) -> Task:
    """Training conversations of midtraining. Raises UserError when their data cannot be had."""
    _check(which)
    if which == "local":
        return _local(LOCAL_MID)
    if which == "memory":
        return _memory("mid", _local(LOCAL_MID))
    if which == "recall":
        return Recall(RECALL["mid"], "train")
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
    _check(which)
    if which == "local":
        return _local_val()
    if which == "memory":
        return _memory("val", _local_val())
    if which == "recall":
        return Recall(RECALL["val"], "test")
    return TaskMixture([SmolTalk("test"), MMLU("all", "test", stop=5200), GSM8K("main", "test", stop=420)])


def sft_mixture(which: str) -> Task:
    """Training conversations of supervised finetuning. Raises UserError when their data cannot be had."""
    _check(which)
    if which == "local":
        return _local(LOCAL_SFT, start=max(LOCAL_MID.values()))
    if which == "memory":
        return _memory("sft", _local(LOCAL_SFT, start=max(LOCAL_MID.values())))
    if which == "recall":
        return Recall(RECALL["mid"] + RECALL["sft"], "train", start=RECALL["mid"])
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
    _check(which, ("full", "local"))
    if which == "local":
        sums = {"two_steps": 0.2, "max_operand": 999}  # harder than those before: there must be something to gain
        return Arithmetic(LOCAL_RL, "train", **sums), Arithmetic(LOCAL_RL, "test", **sums)
    return GSM8K("main", "train"), GSM8K("main", "test")


def eval_tasks(which: str) -> dict:
    """Name -> constructor of the tasks that chat_eval scores; BASELINES has the accuracy of guessing."""
    _check(which)
    recall = {"Recall": partial(Recall, 128, "test")}
    if which == "recall":
        return recall
    if which in ("local", "memory"):
        spelling = {"SpellingBee": partial(SpellingBee, 128, "test", words="text")}
        return {
            "Arithmetic": partial(Arithmetic, 256, "test"),
            **(spelling if _spelling(1, 1, "test", words="text") else {}),
            **(recall if which == "memory" else {}),
        }
    return {
        "ARC-Easy": partial(ARC, "ARC-Easy", "test"),
        "ARC-Challenge": partial(ARC, "ARC-Challenge", "test"),
        "MMLU": partial(MMLU, "all", "test"),
        "GSM8K": partial(GSM8K, "main", "test"),
        "HumanEval": HumanEval,
        "SpellingBee": partial(SpellingBee, 256, "test"),
    }
