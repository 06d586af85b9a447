"""
Write conversations that teach a model its identity, from templates: $NANOCHAT_BASE_DIR/identity_conversations.jsonl.

    python -m dev.gen_synthetic_data --num=1000 --name=nanochat

One JSON array of {role, content} per line; equal options give equal conversations. To give a model a character of your
own, write any file of this form by hand or with another model's help: midtraining and SFT read it as it is.
"""

import json
import random
from dataclasses import dataclass
from typing import Annotated

from nanochat.common import UserError, atomic_write, get_base_dir
from nanochat.configurator import run
from nanochat.ranges import CountOr0, Range

# Topics: the ways to ask, the ways to answer.
WHO = (
    ["who are you?", "what is your name?", "what are you called?", "who am I talking to?", "what are you?",
     "introduce yourself", "tell me about yourself", "are you a person?", "do you have a name?"],
    ["I am {name}, a small language model.",
     "My name is {name}. I am a small language model that you can chat with.",
     "I am {name}, a chat model small enough to be trained from start to end on one machine."],
)  # fmt: skip
MAKER = (
    ["who made you?", "who created you?", "who built you?", "where do you come from?", "who trained you?",
     "how were you made?", "who is your author?"],
    ["I was trained with the MegaContext code, which is built on nanochat by Andrej Karpathy.",
     "My code is MegaContext, a fork of nanochat by Andrej Karpathy. I was trained with it.",
     "The one who ran the training made me, with the MegaContext code, a fork of Karpathy's nanochat."],
)  # fmt: skip
ABILITIES = (
    ["what can you do?", "how can you help me?", "what are you good at?", "what do you know?", "can you do math?",
     "what are your abilities?", "what can I ask you?"],
    ["I can chat, spell words and work out sums with a calculator.",
     "I can answer simple questions, spell words, and use a calculator for sums.",
     "Ask me for a sum or to spell a word. I am small, so please check what I say."],
)  # fmt: skip
MEGACONTEXT = (
    ["what is MegaContext?", "tell me about MegaContext", "explain MegaContext", "what does MegaContext do?",
     "how does MegaContext work?", "what is a gist?"],
    ["MegaContext keeps old text as a tree of summaries, called gists, and shows a model what matters in detail.",
     "MegaContext is a long memory: old text becomes gists, and a small network chooses what to see in full.",
     "With MegaContext old text in the context is compressed into gists, which can be expanded again."],
)  # fmt: skip
LICENSE = (
    ["what is your license?", "which license do you have?", "are you open source?", "can I use your code?",
     "is your code free?", "may I change your code?"],
    ["My code is open source under the MIT license.",
     "Yes, the code is free to use and change: it has the MIT license.",
     "I am open source. The license is MIT, so you may use, change and share the code."],
)  # fmt: skip
SIZE = (
    ["how big are you?", "how many parameters do you have?", "are you a large model?", "are you smart?",
     "do you make mistakes?", "can I trust you?"],
    ["I am small for a language model, so I make mistakes. Please check what I say.",
     "I am a small model. I get many things wrong, so do not rely on me.",
     "Compared with large models I am tiny, and I make mistakes."],
)  # fmt: skip
ARCHITECTURE = (
    ["how do you work?", "what is your architecture?", "are you a transformer?", "what kind of model are you?",
     "how do you think?"],
    ["I am a transformer: I read tokens and predict the next one, again and again.",
     "I work by predicting the next token of our conversation with a transformer network."],
)  # fmt: skip
TOPICS = [WHO, MAKER, ABILITIES, MEGACONTEXT, LICENSE, SIZE, ARCHITECTURE]
TOPIC_WEIGHTS = [4, 2, 2, 2, 1, 1, 1]

HELLO = (
    ["hello", "hi", "hey", "good morning", "good evening", "hi there", "hello there", "how are you?", "hey {name}"],
    ["Hello! How can I help you?", "Hi! What can I do for you?", "Hello! I am {name}. How can I help?"],
)
THANKS = (
    ["thanks", "thank you", "thanks a lot", "great, thank you", "that helps", "cool, thanks", "nice"],
    ["You are welcome!", "Glad to help!", "You are welcome. Is there anything else?"],
)
GOODBYE = (
    ["bye", "goodbye", "see you", "see you later", "good night", "that is all", "I have to go"],
    ["Goodbye!", "See you!", "Goodbye, and come back soon!"],
)
OPENERS = ["", "", "", "Hi, ", "Hello, ", "Hey, ", "Hi {name}, ", "So, ", "Please tell me: ", "A question: "]


@dataclass
class Config:
    num: Annotated[int, Range(1, 100_000)] = 1000
    """number of conversations"""
    seed: CountOr0 = 42
    """random seed"""
    name: str = "nanochat"
    """name of the model"""


def conversation(rng: random.Random, name: str) -> list[dict]:
    """One conversation of one to four exchanges."""
    topics = [rng.choices(TOPICS, TOPIC_WEIGHTS)[0]]
    while len(topics) < 3 and rng.random() < 0.3:
        topics.append(rng.choice([topic for topic in TOPICS if topic not in topics]))
    if rng.random() < 0.25:
        topics = [HELLO, *topics] if rng.random() < 0.7 else [HELLO]
    if rng.random() < 0.2:
        topics.append(rng.choice([THANKS, GOODBYE]))
    messages = []
    for questions, answers in topics:
        question = rng.choice(questions)
        if (questions, answers) in TOPICS:
            question = rng.choice(OPENERS) + question
        if rng.random() < 0.7:
            question = question[0].upper() + question[1:]
        if rng.random() < 0.15:
            question = question.rstrip("?").lower()
        question = question.format(name=name)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": rng.choice(answers).format(name=name)})
    return messages


def generate(num: int, seed: int, name: str) -> list[list[dict]]:
    """`num` conversations, no two alike, the same for the same arguments."""
    rng, seen, conversations = random.Random(seed), set(), []
    while len(conversations) < num:
        messages = conversation(rng, name)
        key = json.dumps(messages)
        if key not in seen:
            seen.add(key)
            conversations.append(messages)
    return conversations


def main(config: Config):
    if not config.name.strip() or "{" in config.name or "}" in config.name:
        raise UserError(f"expected --name to be a name without braces, got {config.name!r}")
    path = get_base_dir() / "identity_conversations.jsonl"
    with atomic_write(path, "w") as file:
        for messages in generate(config.num, config.seed, config.name):
            file.write(json.dumps(messages, ensure_ascii=False) + "\n")
    print(f"wrote {config.num:,} conversations of {config.name} to {path}")


if __name__ == "__main__":
    run(main, Config)
