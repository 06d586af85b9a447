"""
Two tasks on the letters of words, which a model that reads tokens cannot see.

SpellingBee: how often is a letter in a word? The answer spells the word, counts along, checks itself with the
calculator tool and ends in "#### " and the number. SimpleSpelling: spell a word, which is what the first lacks
most often.
"""

from tasks.common import GeneratedTask, NumberTask, last_text
from tasks.words import split_words, word_list

QUESTIONS = [
    "How many {letter} are in {word}?",
    "How many {letter} are there in the word {word}?",
    "How many times does {letter} appear in {word}?",
    "How often does the letter {letter} occur in {word}?",
    "Count the letter {letter} in {word}.",
    "Count how many {letter} {word} has",
    "In the word {word}, how many {letter} are there?",
    "{word}: how many {letter}?",
    "What is the number of {letter} in {word}?",
    "Tell me how many times {letter} is in {word}",
    "Can you count the {letter} in {word}?",
    "Does {word} have any {letter}, and how many?",
    "Number of letters {letter} in {word}",
    "If I write {word}, how many {letter} do I write?",
    # Spanish, French, German, Italian, Portuguese
    "¿Cuántas {letter} hay en {word}?",
    "¿Cuántas veces aparece {letter} en {word}?",
    "Combien de {letter} y a-t-il dans {word} ?",
    "Combien de fois trouve-t-on {letter} dans {word} ?",
    "Wie viele {letter} sind in {word}?",
    "Wie oft kommt {letter} in {word} vor?",
    "Quante {letter} ci sono in {word}?",
    "Quantas letras {letter} tem {word}?",
    # Chinese, Japanese, Korean
    "{word}里有几个{letter}?",
    "单词{word}中字母{letter}出现几次?",
    "{word}に{letter}はいくつありますか?",
    "{word}에 {letter}가 몇 개 있나요?",
]
SPELL_QUESTIONS = [
    "Spell the word: {word}",
    "Spell the word {word}",
    "Spell {word}",
    "How do you spell {word}?",
    "What are the letters of {word}?",
]
QUOTES = ["{}", "'{}'", '"{}"']


class _WordTask(GeneratedTask):
    """`size` questions on words. Neither seeds nor words of split "test" are in "train"."""

    def __init__(self, size: int, split: str, words: str = "large", **slicing):
        super().__init__(size, split, **slicing)
        self.words = split_words(word_list(words), split)
        self.letters = sorted(set("".join(self.words)))


def spell(word: str) -> str:
    """The letters with commas between them: with its comma each is a token of its own."""
    return ",".join(word)


class SpellingBee(_WordTask, NumberTask):
    """Count a letter in a word, by hand and with the tool."""

    def get_example(self, index):
        rng = self.random(index)
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.9 else self.letters)
        count, running, steps = word.count(letter), 0, []
        for char in word:
            running += char == letter
            steps.append(f"{char}{running}")
        quote = rng.choice(QUOTES)
        question = rng.choice(QUESTIONS).format(letter=quote.format(letter), word=quote.format(word))
        if rng.random() < 0.3:
            question = question.lower()
        by_hand = f"{word}: {spell(word)}\nCounting {letter}: {' '.join(steps)}\nThat makes {count}."
        content = [
            {"type": "text", "text": f"{by_hand} Checking with Python: "},
            {"type": "python", "text": f"'{word}'.count('{letter}')"},
            {"type": "python_output", "text": str(count)},
            {"type": "text", "text": f"\n#### {count}"},
        ]
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": content}]}


class SimpleSpelling(_WordTask):
    """Spell a word."""

    def get_example(self, index):
        rng = self.random(index)
        word = rng.choice(self.words)
        question = rng.choice(SPELL_QUESTIONS).format(word=word)
        answer = f"{word}: {spell(word)}"
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    def evaluate(self, conversation, assistant_response):
        return assistant_response.strip() == last_text(conversation)
