"""
RULER's tasks (arXiv 2404.06654), generated here in its format: questions at the end of long texts about their content.

    niah_single_1    a number behind a key, among repeated sentences          niah_multikey_1   among four keys
    niah_single_2    the same in local text                                   niah_multivalue   four numbers of one key
    vt               variables assigned to each other, five to be named       cwe               the ten commonest words

As in RULER, vt and cwe begin with a small example, answers are generated greedily, and the score is the share of the
reference answers that occur in the output. The words are our own, and local text replaces essays. For small models with
few words, recall_single and recall_multikey hide facts among sentences of nanochat.recall and ask in its form.
"""

import random
import string
from functools import partial
from typing import NamedTuple

from nanochat.common import UserError
from nanochat.recall import ANIMALS, COLOURS, EVERYDAY, FOODS, LEXICON, NAMES, VERBS, told_of

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
LEAST = 8  # units of a haystack: sentences, lines or words
COMMON = 10


class Haystack(NamedTuple):
    """A task's material: number of units, lines of the local text they come from, target length in tokens."""

    size: int
    lines: list[str]
    length: int


class Question(NamedTuple):
    prompt: str
    answers: list[str]
    new_tokens: int  # that an answer may take


def hidden(rng, needles, haystack) -> str:
    """The haystack, a list of texts, with the needles at random places, in their order."""
    places = sorted(rng.sample(range(len(haystack)), len(needles)), reverse=True)
    haystack = list(haystack)
    for place, needle in zip(places, reversed(needles), strict=True):
        haystack.insert(place, needle)
    return "\n".join(haystack)


def excerpt(rng, hay) -> list[str]:
    """Consecutive lines of the text from a random one on, cyclically."""
    start = rng.randrange(len(hay.lines))
    return [hay.lines[(start + i) % len(hay.lines)] for i in range(hay.size)]


def niah(rng, hay, keys=1, values=1, noise=False) -> Question:
    names = rng.sample([f"{colour}-{animal}" for colour in COLOURS for animal in ANIMALS], keys)
    numbers = [str(number) for number in rng.sample(range(10**6, 10**7), keys * values)]
    owners = [name for name in names for _ in range(values)]
    facts = [
        f"One of the special magic numbers for {name} is: {number}."
        for name, number in zip(owners, numbers, strict=True)
    ]
    context = hidden(rng, rng.sample(facts, len(facts)), [NOISE] * hay.size if noise else excerpt(rng, hay))
    one = values == 1
    what, some, be, all_of = ("number", "A", "is", "is") if one else ("numbers", "Some", "are", "are all")
    prompt = (
        f"{some} special magic {what} {be} hidden within the following text. Make sure to memorize it. I will quiz you "
        f"about the {what} afterwards.\n{context}\nWhat {all_of} the special magic {what} for {names[0]} mentioned in "
        f"the provided text? The special magic {what} for {names[0]} mentioned in the provided text {be}"
    )
    return Question(prompt, numbers[:values], 128)


def variable_tracking(rng, hay, letters=5) -> Question:
    names = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        names += [name] * (name not in names)
    value = rng.randrange(10000, 99999)
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {names[i + 1]} = VAR {names[i]}" for i in range(4))]
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{hidden(rng, chain, [NOISE] * hay.size)}\nQuestion: Find all variables that are assigned the value "
        f"{value} in the text above. Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:"
    )
    if letters == 5:
        shown = variable_tracking(rng, hay._replace(size=LEAST), letters=3)
        prompt = f"{shown.prompt} {' '.join(shown.answers)}\n\n{prompt}"
    return Question(prompt, names, 30)


def common_words(rng, hay, times=None) -> Question:
    """Units: distinct words besides the common ones; if LEXICON has too few, all words are repeated more often."""
    most, own = len(LEXICON) - COMMON, (6, 1) if hay.length < 4096 else (30, 3)
    repeat, words, times = -(-hay.size // most), rng.sample(LEXICON, COMMON + min(hay.size, most)), times or own
    listed = (words[:COMMON] * times[0] + words[COMMON:] * times[1]) * repeat
    rng.shuffle(listed)
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{numbered(listed)}\nQuestion: What are the 10 most common words in the above list? "
        "Answer: The top 10 words that appear most often in the list are:"
    )
    if times is own:
        shown = common_words(rng, hay._replace(size=COMMON), (3, 1))
        prompt = f"{shown.prompt} {numbered(shown.answers)}\n{prompt}"
    return Question(prompt, words[:COMMON], 120)


def numbered(words) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


def recall(rng, hay, keys=1, ask=True) -> Question:
    """ask: as in nanochat.recall.Sizes: whether a question precedes the restated fact."""
    words, names, foods = rng.sample(LEXICON, 16), rng.sample(NAMES, keys), rng.sample(FOODS, keys)
    facts = [f"{told_of('food', name)} {food}." for name, food in zip(names, foods, strict=True)]
    pairs = [rng.choice(list(zip(words, words[1:] + words[:1], strict=True))) for _ in range(hay.size)]
    context = hidden(rng, rng.sample(facts, keys), [rng.choice(EVERYDAY).format(*pair) for pair in pairs])
    asked = f"What did they {VERBS['food'][0]} {names[0]}? " if ask else ""
    return Question(f"{context}\n{asked}{told_of('food', names[0])}", foods[:1], 8)


TASKS = {
    "niah_single_1": partial(niah, noise=True),
    "niah_single_2": niah,
    "niah_multikey_1": partial(niah, keys=4),
    "niah_multivalue": partial(niah, values=4),
    "vt": variable_tracking,
    "cwe": common_words,
}


def recall_tasks(ask=True) -> dict:
    return {"recall_single": partial(recall, ask=ask), "recall_multikey": partial(recall, keys=4, ask=ask)}


def question(name, task, length, index, tokenizer, lines, seed=0) -> Question | None:
    """
    Question number `index` of the task, as long as fits into `length` tokens with BOS and the answer; None if even its
    shortest form does not fit. lines: of local text.
    """

    def made(size):
        rng = random.Random(f"ruler {seed} {name} {length} {index}")
        asked = task(rng, Haystack(size, lines, length))
        return asked, 1 + len(tokenizer.encode(asked.prompt)) + asked.new_tokens

    size = step = LEAST
    best, used = made(size)
    if used > length:
        return None
    while step:
        larger, tokens = made(size + step)
        if tokens <= length:
            per_unit, size = max(1, (tokens - used) / step), size + step
            best, used = larger, tokens
            step = max(1, int((length - used) / per_unit))
        else:
            step //= 2
    return best


def share_said(said: str, answers) -> float:
    """The share of the answers that occur in the output, ignoring case."""
    return sum(answer.lower() in said.lower() for answer in answers) / len(answers)


def ruler(tokenizer, readers, lengths, samples, lines, tasks=TASKS, seed=0) -> list[dict]:
    """
    A row for each task and length that it fits into: {"task", "tokens", "samples", "<reader>": mean score}.

    readers: name → function(ids of the prompt, new tokens) -> the answer, or None where the prompt is too long.
    Raises UserError when no task fits.
    """
    rows, bos = [], tokenizer.get_bos_token_id()
    for name, task in tasks.items():
        for length in lengths:
            asked = [question(name, task, length, index, tokenizer, lines, seed) for index in range(samples)]
            asked = [one for one in asked if one]
            if not asked:
                continue
            row = {"task": name, "tokens": length, "samples": len(asked)}
            for reader, read in readers.items():
                said = [read(tokenizer.encode(one.prompt, prepend=bos), one.new_tokens) for one in asked]
                pairs = zip(said, asked, strict=True)
                scores = [share_said(text, one.answers) for text, one in pairs if text is not None]
                row[reader] = sum(scores) / len(scores) if scores else None
            rows.append(row)
    if not rows:
        raise UserError(f"--ruler_lengths: expected lengths that a task fits into, got {', '.join(map(str, lengths))}")
    return rows
