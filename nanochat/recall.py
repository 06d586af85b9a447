"""
Generated documents whose later parts depend on earlier ones at a known distance, to train and test long memory.

A document is English of few words and forms, one sentence a line. Three things in it reach far back:

- its vocabulary: its everyday sentences use a few words of LEXICON, different ones than other documents;
- facts, "They fed Maria cream.", stated once; some of them are asked for later, the rest distract:
  "What did they feed Maria? They fed Maria cream.";
- tables, "- Maria, red, 48" under a head line, one cell of which is asked for later in the same form.

No name has two values of an attribute, so every question has one right answer, which only the fact determines. The
value follows the name directly, in the fact and in the answer, so a small model only has to learn to find the name. A
distance is the number of characters from the start of the fact to the start of the answer. At a
vocabulary of 1,024 tokens about 3.3 characters make a token, at 4,096 about 4.4.
"""

import heapq
import itertools
import json
import math
import random
from dataclasses import asdict, dataclass

import numpy as np

from nanochat.common import UserError, atomic_write
from nanochat.sources import SHARD_CHARS, VAL_FRACTION, write_shards

KEY_FILE = "recall_val_key.jsonl"  # the answer key, beside the shards


def _words(text):
    return text.split()


NAMES = _words(
    "Adam Alice Anna Anton Bella Boris Carl Clara Daniel David Diana Edgar Elena Emil Emma Eric Eva Felix Flora Frank "
    "Fred George Grace Greta Hans Harry Helen Henry Hugo Ida Igor Irene Ivan Jack Jacob James Jane John Julia Karin "
    "Kate Laura Leo Linda Lisa Louis Lucy Marco Maria Mark Martin Max Mila Nina Nora Oscar Otto Paul Peter Rosa Sam "
    "Sara Tom Vera"
)
CITIES = _words(
    "Athens Berlin Bern Bombay Boston Cairo Chicago Delhi Dublin Geneva Kiev Lima Lisbon London Madrid Malta Miami "
    "Milan Moscow Naples Oslo Oxford Paris Prague Riga Rome Seoul Tokyo Turin Venice Vienna Zurich"
)
FOODS = _words(
    "bacon beans bread butter cake carrots cheese corn cream eggs fish fruit garlic ham honey jam lamb meat milk nuts "
    "onions pasta pears pizza plums rice salad salt soup sugar toast yogurt"
)
COLOURS = _words("black blue brown gold green grey orange pink purple red silver white yellow")

NUMBERS = _words(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
    "nineteen twenty"
)
ANIMALS = _words(
    "ant bat bear bee cat cow crab deer dog duck eagle fox frog goat hawk hen horse lion mole monkey mouse owl pig "
    "rabbit rat seal shark sheep snake tiger whale wolf"
)
FACTS = {"animal": ANIMALS, "city": CITIES, "food": FOODS}  # attribute -> its values
COLUMNS = {"colour": COLOURS, "number": NUMBERS}
VERBS = {  # attribute -> what was done with it, as asked and as told
    "animal": ("give", "gave"),
    "city": ("show", "showed"),
    "food": ("feed", "fed"),
    "colour": ("paint", "painted"),
    "number": ("deal", "dealt"),
}
ROWS = 3  # of a table
MARGIN = 80  # characters at the end that no answer is meant for: questions may have to wait for each other

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
LEXICON = random.Random("lexicon").sample(["".join(word) for word in itertools.product(SYLLABLES, repeat=3)], 2048)
EVERYDAY = (
    "The {0} sees the {1}.",
    "The {0} sits by the {1}.",
    "The {0} likes the {1}.",
    "The {0} and the {1} sleep.",
)


@dataclass(frozen=True)
class Question:
    """Where a question, its answer (with the space before it) and the fact it needs are in a text: [start, end)."""

    kind: str  # "fact" or "table"
    attribute: str  # of FACTS or COLUMNS
    fact: tuple[int, int]
    question: tuple[int, int]
    answer: tuple[int, int]

    @property
    def distance(self) -> int:
        return self.answer[0] - self.fact[0]


@dataclass(frozen=True)
class Sizes:
    """Parameters of a document; -1 is replaced by a value that suits its length. Raises UserError if impossible."""

    chars: int = 4000  # length, to within some lines
    questions: int = -1  # number of facts that are asked for
    tables: int = -1  # number of tables; one cell of each is asked for
    distractors: int = -1  # number of facts that are not asked for
    words: int = 16  # number of words of LEXICON that occur
    min_distance: int = 128  # distances are log-uniform between these two, and overshoot by some lines
    max_distance: int = -1  # -1: as far as the document reaches
    times: int = 1  # how often each fact is asked for, each time at its own distance
    ask: bool = True  # False: facts are restated without a question, which is learned sooner

    def __post_init__(self):
        _check(self.times >= 1, "1 or more times", self.times)
        suitable = {
            "questions": min(self.chars // (160 * self.times), 96),
            "tables": min(self.chars // 2000, 8),
            "distractors": min(self.chars // 800, 48),
        }
        for name, value in suitable.items():
            if getattr(self, name) == -1:
                object.__setattr__(self, name, value)
            _check(getattr(self, name) >= 0, f"0 or more {name}, or -1 for what suits", getattr(self, name))
        facts, most = self.questions + self.distractors, len(FACTS) * len(NAMES)
        _check(self.tables <= len(NAMES) // ROWS, f"at most {len(NAMES) // ROWS} tables", self.tables)
        _check(facts <= most, f"at most {most} questions and distractors", facts)
        _check(3 <= self.words <= len(LEXICON), f"3 to {len(LEXICON)} words", self.words)
        # Smaller than this, a fact or a table would not have ended yet when it is asked for.
        least = 128 if self.tables else 32
        _check(self.min_distance >= least, f"a min_distance of {least} characters or more", self.min_distance)
        far = f"a max_distance of {self.min_distance} (min_distance) or more, or -1"
        _check(self.max_distance == -1 or self.max_distance >= self.min_distance, far, self.max_distance)
        # The mean lengths of these lines, and a quarter more to put between them.
        asked = self.times * (50 if self.ask else 24)
        least = ((24 + asked) * self.questions + (100 + asked) * self.tables + 24 * self.distractors) * 5 // 4
        have = f"{self.questions} questions, {self.tables} tables and {self.distractors} distractors"
        _check(self.chars >= least, f"at least {least} characters for {have}", self.chars)
        reach = max(self.min_distance, self.max_distance) + 100
        _check(self.chars >= reach, f"at least {reach} characters for the distances", self.chars)


def _check(fits, expected, got):
    if not fits:
        raise UserError(f"recall documents: expected {expected}, got {got}")


# From 1.5 to 2.5 million tokens of these a model of four layers learns to look up, at half the usual rates, and not
# from as many of longer documents with more facts, nor with other text between; once it can, it does so there, too.
PRIMER = Sizes(chars=1000, questions=4, tables=0, distractors=0, min_distance=32, times=6, ask=False)


def recall_documents(seed: int, count: int, split="eval", **sizes):
    """
    Yield `count` documents (text, questions); `sizes` are fields of Sizes.

    The same seed, split and sizes give the same documents, a smaller count the first of them. Shards hold the splits
    "train" and "val". No two splits or seeds share a stream of random numbers.
    """
    for index in range(count):
        yield recall_document(random.Random(f"recall {seed} {split} {index}"), **sizes)


def recall_document(rng: random.Random, **sizes) -> tuple[str, list[Question]]:
    """A document with `sizes`, fields of Sizes, and its questions in the order in which they are asked."""
    sizes = Sizes(**sizes)
    words = rng.sample(LEXICON, sizes.words)
    friends = dict(zip(words, words[1:] + words[:1], strict=True))
    coming = sorted(_statements(rng, sizes), key=lambda statement: statement.place, reverse=True)
    lines, length, due, questions, order = [], 0, [], [], itertools.count()

    def add(line):
        nonlocal length
        lines.append(line)
        length += len(line)
        return length - len(line), length - 1  # without the line end

    while True:
        if due and due[0][0] <= length:
            _, fact, _, statement = heapq.heappop(due)
            question, told, answer = statement.asked(sizes.ask)
            start, end = add(f"{question}{told}{answer}.\n")
            question, answer = (start, start + len(question)), (end - 1 - len(answer), end - 1)
            questions.append(Question(statement.kind, statement.attribute, fact, question, answer))
        elif coming and coming[-1].place <= length:
            statement = coming.pop()
            spans = [add(line) for line in statement.lines]
            for distance in statement.distances:
                fact = spans[statement.row]
                question, told, _ = statement.asked(sizes.ask)
                start = fact[0] + distance - len(question + told)
                heapq.heappush(due, (start, fact, next(order), statement))
        else:
            one, other = rng.choices(words, k=2)
            line = rng.choice(EVERYDAY).format(one, friends[one], other, friends[other]) + "\n"
            if not (coming or due) and length + len(line) > sizes.chars:
                return "".join(lines), questions
            add(line)


@dataclass(frozen=True)
class _Statement:
    """Lines that hold a fact in `lines[row]`: where they belong, and how far from there it is asked for."""

    place: float
    distances: list[int]
    lines: list[str]
    row: int
    kind: str
    attribute: str
    name: str
    value: str

    def asked(self, ask) -> tuple[str, str, str]:
        """The question (empty if nothing is asked), what leads to the answer, the answer."""
        told, answer = told_of(self.attribute, self.name), f" {self.value}"
        question = f"What did they {VERBS[self.attribute][0]} {self.name}?"
        return (question, f" {told}", answer) if ask else ("", told, answer)


def told_of(attribute, name) -> str:
    """The words before a value: "They fed Maria"."""
    return f"They {VERBS[attribute][1]} {name}"


def _statements(rng, sizes):
    """
    The statements of a document, in no order.

    No name is in two of them while there are others, and all facts are of one attribute while there are names
    without it: only by its name is a fact told from the rest.
    """
    names, attributes = rng.sample(NAMES, len(NAMES)), rng.sample([*FACTS], len(FACTS))
    for first in range(0, ROWS * sizes.tables, ROWS):
        rows = [(name, *map(rng.choice, COLUMNS.values())) for name in names[first : first + ROWS]]
        lines = [f"Table: name, {', '.join(COLUMNS)}\n", *(f"- {', '.join(row)}\n" for row in rows)]
        row, column = rng.randrange(ROWS), rng.randrange(len(COLUMNS))
        name, value, attribute = rows[row][0], rows[row][1 + column], [*COLUMNS][column]
        yield _Statement(*_place(rng, sizes), lines, 1 + row, "table", attribute, name, value)

    for number in range(sizes.questions + sizes.distractors):
        turn, which = divmod(ROWS * sizes.tables + number, len(names))
        name, attribute = names[which], attributes[turn % len(attributes)]
        value = rng.choice(FACTS[attribute])
        line = f"{told_of(attribute, name)} {value}.\n"
        place = _place(rng, sizes) if number < sizes.questions else (rng.uniform(0, sizes.chars), [])
        yield _Statement(*place, [line], 0, "fact", attribute, name, value)


def _place(rng, sizes):
    """(character at which a statement should begin, distances from there to the answers)"""
    reach = sizes.chars - MARGIN
    low, high = sizes.min_distance, min(reach, sizes.max_distance if sizes.max_distance != -1 else reach)
    distances = [round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in range(sizes.times)]
    return rng.uniform(0, reach - max(distances)), distances


# ---------------------------------------------------------------------------------------------------------
# Shards and their answer key


def make_shards(seed: int, documents: int, sizes: Sizes, track, train_paths, val_path) -> dict:
    """
    Write `documents` training documents, VAL_FRACTION as many for validation, and KEY_FILE beside val_path.

    track(iterable, label, total=...): shows progress. Returns what nanochat.sources.make_shards does.
    The key has one JSON object a validation document, in the order of the shard's rows: "index", "text" and
    "questions", each the fields of Question and its distance.
    """
    _check(documents >= 1, "1 or more documents", documents)

    def generate(split, count):
        return track(recall_documents(seed, count, split, **asdict(sizes)), split, total=count)

    def keyed(documents, key):
        for index, (text, questions) in enumerate(documents):
            asked = [asdict(question) | {"distance": question.distance} for question in questions]
            key.write(json.dumps({"index": index, "text": text, "questions": asked}) + "\n")
            yield text

    val = min(max(1, round(VAL_FRACTION * documents)), max(1, SHARD_CHARS // (2 * sizes.chars)))  # they fit in a shard
    with atomic_write(val_path.with_name(KEY_FILE), "w") as key:
        val = write_shards(keyed(generate("val", val), key), [val_path])
    return {"val": val, "train": write_shards((text for text, _ in generate("train", documents)), train_paths)}


def token_spans(ids, token_bytes, spans) -> list[tuple[int, int]]:
    """
    The tokens [first, last) that cover each span of characters of a document.

    ids: the document as tokens, with BOS or without; token_bytes: bytes per token, from get_token_bytes().
    """
    ends = np.cumsum(np.asarray(token_bytes)[np.asarray(ids)])  # all characters of a document are ASCII
    starts, stops = np.array(spans).T
    first, last = np.searchsorted(ends, starts, side="right"), np.searchsorted(ends, stops, side="left")
    return list(zip(first.tolist(), (last + 1).tolist(), strict=True))
