"""Tasks on what no model can know: made-up people, a made-up vocabulary, made-up plurals."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rows import TEST_ROWS, TRAIN_ROWS, Row, Split, choice, draw_for, listed, split_rows, written

STARTS = listed("b br d dr f g gl h j k kl l m n p pl r s st t tr v z")
VOWELS = listed("a e i o u")
ENDS = listed("k l m n r s t")
PEOPLE = 12
OPENINGS = ("", "Tell me: ", "A short question: ", "I wonder: ")
ATTRIBUTES = {
    "city": listed("Lisbon Oslo Quito Cairo Hanoi Dublin Lima Seoul"),
    "trade": listed("baker painter sailor lawyer farmer tailor dentist pilot"),
    "instrument": listed("violin trumpet piano flute drum harp banjo cello"),
    "animal": listed("horse parrot rabbit snake goat tortoise donkey ferret"),
}
QUESTIONS = {
    "city": (
        "Where does {} live?", "In which city does {} live?", "{} lives in which city?",
        "What is the home of {}?", "Which city is {} from?",
    ),
    "trade": (
        "What does {} do for a living?", "What is the trade of {}?", "What does {} work as?",
        "Which profession has {}?", "What is the job of {}?",
    ),
    "instrument": (
        "What does {} play?", "Which instrument does {} play?", "What is the instrument of {}?",
        "On which instrument does {} play?", "{} plays which instrument?",
    ),
    "animal": (
        "What animal does {} keep?", "Which animal has {}?", "What is the pet of {}?",
        "{} keeps which animal?", "Which animal lives with {}?",
    ),
}  # fmt: skip
"""Ways to ask; the last one is for held-out rows only."""
PHRASES = (
    "the {adjective} {noun} {verb} the {other}",
    "the {noun} {verb} the {adjective} {other}",
    "every {noun} {verb} the {other}",
    "the {noun} never {verb} the {other}",
)
ADJECTIVES = listed("red old small cold happy")
NOUNS = listed("dog king tree river baker stone child boat")
VERBS = listed("sees loves finds carries hears wants")


def made_up(draw: random.Random, number: int, syllables: int = 2) -> list[str]:
    """Different words that sound like some language and are of none."""
    words: dict[str, None] = {}
    while len(words) < number:
        parts = [draw.choice(STARTS) + draw.choice(VOWELS) for _ in range(syllables)]
        words["".join(parts) + draw.choice(ENDS)] = None
    return list(words)


def facts() -> Split:
    """Four facts of each of twelve people, asked in five ways, the last of them held out."""
    draw = draw_for("invented_facts")
    given, family = made_up(draw, PEOPLE), made_up(draw, PEOPLE, 1)
    train: list[Row] = []
    test: list[Row] = []
    for first, last in zip(given, family, strict=True):
        name = f"{first.capitalize()} {last.capitalize()}"
        for attribute, values in ATTRIBUTES.items():
            value = draw.choice(values)
            for rows, questions in ((train, QUESTIONS[attribute][:-1]), (test, QUESTIONS[attribute][-1:])):
                asked = [opening + question.format(name) for question in questions for opening in OPENINGS]
                rows += [_question(text, value, values, draw) for text in asked]
    draw.shuffle(train)
    draw.shuffle(test)
    return train[:TRAIN_ROWS], test[:TEST_ROWS]


def _question(text: str, right: str, values: Sequence[str], draw: random.Random) -> Row:
    return choice(text, right, draw.sample([value for value in values if value != right], 3), draw)


def vocabulary(draw: random.Random) -> dict[str, str]:
    """A made-up word for every word of the phrases."""
    words = ["the", "every", "never", *ADJECTIVES, *NOUNS, *VERBS]
    return dict(zip(words, made_up(draw, len(words), 1), strict=True))


def language() -> Split:
    """English phrases to be said in the made-up vocabulary, the order of words turned round."""
    made = vocabulary(draw_for("invented_vocabulary"))

    def phrase(draw: random.Random) -> Row:
        noun, other = draw.sample(NOUNS, 2)
        text = draw.choice(PHRASES).format(
            adjective=draw.choice(ADJECTIVES), noun=noun, other=other, verb=draw.choice(VERBS)
        )
        return written(f"Say in Tarvan: {text}", " ".join(made[word] for word in reversed(text.split())))

    return split_rows("invented_language", phrase)


def plural(word: str) -> str:
    """The plural of a made-up word goes by its last letter; those that end in k or t double the first one."""
    if word[-1] in "kt":
        return f"{word[0]}{word}a"
    return f"{word}{'en' if word[-1] in 'lmn' else 'ovi'}"


def plural_form(draw: random.Random) -> Row:
    """A made-up word, of which the plural is wanted."""
    word = made_up(draw, 1)[0]
    return written(f"Tarvan plural of {word}", plural(word))


def tasks() -> dict[str, Split]:
    """Every task of this file."""
    return {
        "invented_facts": facts(),
        "invented_language": language(),
        "invented_plurals": split_rows("invented_plurals", plural_form),
    }
