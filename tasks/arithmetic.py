"""
Small sums, solved with the calculator tool: something that a model of a few million parameters can learn.

The answer begins with the tool call at once, and the call copies the sum from the question as it stands there
(exact divisions become "//", so that the tool says 12 and not 12.0). What is left to learn is to copy the sum,
to recognize it in a story, and to copy the result: "The answer is 75." Numbers have mostly one or two digits,
one token each.

A hash of the two operands decides whether a sum is for training or for testing, whatever its operation, order
and wording. So no sum of the test split occurs in training.
"""

from zlib import crc32

from nanochat.calculator import calculate
from tasks.common import GeneratedTask, NumberTask

SPOKEN_SHARE = 0.1  # of the questions say "plus" for "+"
TEST_SHARE = 10  # one pair of operands in ten
TIMES_TABLE = (30, 12)  # the largest factors

PLAIN = [
    "What is {e}?",
    "What's {e}?",
    "{e} = ?",
    "{e}=?",
    "{e}",
    "How much is {e}?",
    "Calculate {e}.",
    "Compute {e}",
    "Please calculate {e}.",
    "Can you tell me what {e} is?",
]
SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}
# The operands stand in the order of the sum.
STORIES = {
    "+": [
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "There are {a} {things} in one box and {b} in another. How many {things} are there in all?",
        "{name} read {a} pages on Monday and {b} on Tuesday. How many pages is that?",
        "A train carries {a} people, then {b} more get on. How many people are on it?",
    ],
    "-": [
        "{name} has {a} {things} and gives away {b}. How many {things} are left?",
        "A shop has {a} {things} and sells {b}. How many {things} remain?",
        "There are {a} people on a bus and {b} get off. How many people stay on?",
        "{name} had {a} dollars and spent {b}. How many dollars are left?",
    ],
    "*": [
        "There are {a} boxes with {b} {things} each. How many {things} are there?",
        "{name} buys {a} bags of {b} {things}. How many {things} is that?",
        "{name} plants {a} rows of {b} trees. How many trees is that?",
        "A ticket costs {a} dollars. How much do {b} tickets cost?",
    ],
    "/": [
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each get?",
        "{a} {things} are packed into bags of {b}. How many bags are there?",
        "{a} children form {b} equal teams. How many children are in a team?",
        "{name} has {a} {things} and puts them equally into {b} boxes. How many go into each?",
    ],
}
MORE_STORIES = {
    "+": "{name} has {a} {things}, gets {b} more and then another {c}. How many {things} does {name} have now?",
    "-": "{name} has {a} {things}, gets {b} more and gives away {c}. How many {things} are left?",
}
NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kim", "Lena", "Mona"]
NAMES += ["Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Yusuf"]
THINGS = ["apples", "books", "pens", "coins", "shells", "cards", "stamps", "eggs", "cookies", "marbles", "flowers"]
THINGS += ["stones", "pencils", "balls"]


def pair_split(a: int, b: int) -> str:
    """The split of a sum with these operands, the same for both orders."""
    return "test" if crc32(f"{min(a, b)},{max(a, b)}".encode()) % TEST_SHARE == 0 else "train"


class Arithmetic(GeneratedTask, NumberTask):
    """
    `size` sums of the four operations. split: "train" or "test".

    stories: share that is told as a story; two_steps: share with a third number that is added or taken away;
    max_operand: largest number in sums and differences (beyond 99, a number is more than one token).
    """

    marker = "answer is"

    def __init__(
        self, size: int, split: str, stories: float = 0.3, two_steps: float = 0.0, max_operand: int = 99, **slicing
    ):
        super().__init__(size, split, **slicing)
        self.stories, self.two_steps, self.max_operand = stories, two_steps, max_operand

    def get_example(self, index):
        rng = self.random(index)
        op, a, b = self._draw(rng)
        numbers, call, stories = {"a": a, "b": b}, f"{a} {op} {b}", STORIES[op]
        two_steps = op in "+-" and rng.random() < self.two_steps
        if two_steps:
            then = rng.choice("+-")
            c = rng.randint(2, self.max_operand if then == "+" else min(self.max_operand, a + b))
            numbers["c"], call, stories = c, f"{a} + {b} {then} {c}", [MORE_STORIES[then]]
        kind = rng.random()
        if kind < self.stories:
            question = rng.choice(stories).format(**numbers, name=rng.choice(NAMES), things=rng.choice(THINGS))
        elif kind < self.stories + SPOKEN_SHARE and not two_steps:
            question = f"What is {a} {SPOKEN[op]} {b}?"
        else:
            call = call if rng.random() < 0.7 else call.replace(" ", "")
            question = rng.choice(PLAIN).format(e=call)
        call = call.replace("/", "//")
        result = calculate(call)
        content = [
            {"type": "python", "text": call},
            {"type": "python_output", "text": result},
            {"type": "text", "text": f"The answer is {result}."},
        ]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": content}]}

    def _draw(self, rng):
        """An operation and two operands of this split."""
        op = rng.choice("+-*/")
        while True:
            if op in "+-":
                a, b = rng.randint(2, self.max_operand), rng.randint(2, self.max_operand)
                if op == "-":
                    a, b = max(a, b), min(a, b)
            else:
                a, b = rng.randint(2, TIMES_TABLE[0]), rng.randint(2, TIMES_TABLE[1])
                if op == "/":
                    a = a * b
            if pair_split(a, b) == self.split:
                return op, a, b
