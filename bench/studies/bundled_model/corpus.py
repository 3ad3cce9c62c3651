"""The training text: a seeded mixture of stories, facts, questions, reviews and requests.

Everything is generated from the word lists and grammars of this package; nothing is
downloaded. The same seed always gives the same documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from bundled_model.questions import Question, catalogue
from bundled_model.stories import description, request, review, story


def prompt_of(question: str) -> str:
    """The prompt form of the question/answer documents and of the demo task."""
    return f"Question: {question}\nAnswer:"


def questions(rng: Random, items: tuple[Question, ...]) -> str:
    """One to three questions with their answers, blank line between."""
    count = rng.choice([1, 1, 1, 1, 2, 3])
    chosen = [rng.choice(items) for _ in range(count)]
    return "\n\n".join(f"{prompt_of(item.question)} {item.answer}" for item in chosen)


def reviews(rng: Random) -> str:
    text, label = review(rng)
    return f"Review: {text}\nLabel: {label}"


def requests(rng: Random) -> str:
    ask, response = request(rng)
    if rng.random() < 0.5:
        return f"{prompt_of(ask)} {response}"
    return f"Instruction: {ask}\nResponse: {response}"


def document(rng: Random) -> str:
    """One document; the shares are by count (stories are the longest, so most of the text)."""
    dice = rng.random()
    if dice < 0.28:
        return story(rng)
    if dice < 0.38:
        return description(rng)
    if dice < 0.83:
        return questions(rng, catalogue())
    if dice < 0.91:
        return reviews(rng)
    return requests(rng)


def documents(seed: int) -> Iterator[str]:
    """An endless stream of documents, fixed by the seed."""
    rng = Random(seed)
    while True:
        yield document(rng)
