"""Questions with plain answers about the small world of ``words``.

``catalogue`` lists every (topic, question, answer) once; the corpus draws from it and the demo
task (``pirate``) re-voices its answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from bundled_model.words import (
    ANIMALS,
    COLORS_OF,
    FOODS,
    JOBS,
    MEANINGS,
    NUMBERS,
    OPPOSITES,
    ORDERED,
    THINGS,
)


@dataclass(frozen=True)
class Question:
    topic: str
    question: str
    answer: str


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _animals() -> list[Question]:
    found = []
    for animal in ANIMALS:
        name = article(animal.name)
        subject = capital(name)
        legs = f"{subject} has {animal.legs} legs."
        young = f"A young {animal.name} is called {article(animal.young)}."
        pairs = [
            (f"What does {name} say?", f"{subject} says {animal.sound}."),
            (f"What sound does {name} make?", f"{subject} says {animal.sound}."),
            (f"What does {name} eat?", f"{subject} eats {animal.food}."),
            (f"What food does {name} like?", f"{subject} likes {animal.food}."),
            (f"Where does {name} live?", f"{subject} lives {animal.home}."),
            (f"Where can I find {name}?", f"You can find {name} {animal.home}."),
            (f"What is a young {animal.name} called?", young),
            (f"What do we call a baby {animal.name}?", young),
            (f"How many legs does {name} have?", legs),
            (f"What is {name} like?", f"{subject} is {animal.trait}."),
            (f"What can {name} do?", f"{subject} can {animal.skill}."),
        ]
        found += [Question("animal", question, answer) for question, answer in pairs]
    return found


def _things() -> list[Question]:
    found = []
    for thing in THINGS:
        name = article(thing.name)
        subject = capital(name)
        pairs = [
            (f"What is {name} for?", f"{subject} is used to {thing.use}."),
            (f"Why do people use {name}?", f"People use {name} to {thing.use}."),
            (f"What is {name} made of?", f"{subject} is made of {thing.material}."),
            (f"Where is the {thing.name}?", f"The {thing.name} is {thing.place}."),
            (f"How would you describe {name}?", f"{subject} is {thing.trait}."),
            (f"What do I need to {thing.use}?", f"You need {name} to {thing.use}."),
        ]
        found += [Question("thing", question, answer) for question, answer in pairs]
    return found


def _foods() -> list[Question]:
    found = []
    for food in FOODS:
        subject = capital(food.name)
        pairs = [
            (f"What color is {food.name}?", f"{subject} is {food.color}."),
            (f"How does {food.name} taste?", f"{subject} tastes {food.taste}."),
            (f"What kind of food is {food.name}?", f"{subject} is {food.kind}."),
            (f"Where does {food.name} come from?", f"{subject} comes from {food.source}."),
        ]
        found += [Question("food", question, answer) for question, answer in pairs]
    return found


def _jobs() -> list[Question]:
    found = []
    for job in JOBS:
        name = article(job.name)
        subject = capital(name)
        pairs = [
            (f"What does {name} do?", f"{subject} {job.work}."),
            (f"Where does {name} work?", f"{subject} works {job.place}."),
            (f"What does {name} use?", f"{subject} uses {job.tool}."),
            (f"Who {job.work}?", f"{subject} {job.work}."),
        ]
        found += [Question("job", question, answer) for question, answer in pairs]
    return found


def _language() -> list[Question]:
    found = []
    for pair in OPPOSITES:
        for word, other in (pair, pair[::-1]):
            answer = f"The opposite of {word} is {other}."
            found.append(Question("opposite", f"What is the opposite of {word}?", answer))
            found.append(Question("opposite", f"Which word means not {word}?", answer))
    for thing, color in COLORS_OF:
        answer = f"{capital(thing)} is {color}."
        found.append(Question("color", f"What color is {thing}?", answer))
    for word, meaning in MEANINGS:
        answer = f"{capital(word)} means {meaning}."
        found.append(Question("meaning", f"What does {word} mean?", answer))
        found.append(Question("meaning", f"What is the meaning of {word}?", answer))
    return found


def _order() -> list[Question]:
    found = []
    for kind, names in ORDERED.items():
        for before, after in pairwise(names):
            forward = f"{capital(after)} comes after {before}."
            back = f"{capital(before)} comes before {after}."
            found.append(Question("order", f"Which {kind} comes after {before}?", forward))
            found.append(Question("order", f"Which {kind} comes before {after}?", back))
    return found


def _sums() -> list[Question]:
    found = []
    for a in range(11):
        for b in range(11):
            x, y, total = NUMBERS[a], NUMBERS[b], NUMBERS[a + b]
            plus = f"{capital(x)} plus {y} is {total}."
            found.append(Question("sum", f"What is {x} plus {y}?", plus))
            found.append(Question("sum", f"How much is {x} and {y}?", plus))
            if a >= b:
                minus = f"{capital(x)} minus {y} is {NUMBERS[a - b]}."
                found.append(Question("sum", f"What is {x} minus {y}?", minus))
    return found


@cache
def catalogue() -> tuple[Question, ...]:
    """Every question of the small world, in a fixed order, no question twice."""
    groups = (_animals, _things, _foods, _jobs, _language, _order, _sums)
    unique = {item.question: item for group in groups for item in group()}
    return tuple(unique.values())
