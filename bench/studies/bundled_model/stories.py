"""Stories, descriptions, reviews and requests: the running text of the corpus.

Each function takes a ``random.Random`` and returns one document without a trailing newline.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from bundled_model.questions import article, capital
from bundled_model.words import (
    ANIMALS,
    BOYS,
    COLORS,
    FEELINGS_BAD,
    FEELINGS_GOOD,
    FOODS,
    GIRLS,
    JOBS,
    MEANINGS,
    NUMBERS,
    PLACES,
    SIZES,
    THINGS,
    TIMES,
    WEATHER,
    listed,
)


@dataclass(frozen=True)
class Hero:
    name: str
    he: str
    him: str
    his: str
    kind: str


def hero(rng: Random) -> Hero:
    if rng.random() < 0.5:
        return Hero(rng.choice(GIRLS), "she", "her", "her", "girl")
    return Hero(rng.choice(BOYS), "he", "him", "his", "boy")


def _opening(rng: Random, who: Hero, pet: str) -> list[str]:
    first = rng.choice(
        [
            f"Once upon a time there was a little {who.kind} named {who.name}.",
            f"There once was a {who.kind} called {who.name}.",
            f"{who.name} was a kind {who.kind} who lived near {rng.choice(PLACES)}.",
            f"{who.name} was a {who.kind} with {article(rng.choice(COLORS))} hat.",
        ]
    )
    second = rng.choice(
        [
            f"{capital(who.he)} had {article(pet)}, and they were best friends.",
            f"{who.name} loved {who.his} {pet} very much.",
            f"{capital(who.his)} best friend was a little {pet}.",
            f"Every day {who.he} played with {who.his} {pet}.",
        ]
    )
    return [first, second]


def _scene(rng: Random, who: Hero, place: str) -> list[str]:
    _, weather = rng.choice(WEATHER)
    going = rng.choice(
        [
            f"{rng.choice(TIMES)}, {who.name} went to {place}.",
            f"{rng.choice(TIMES)}, {who.name} and {who.his} friend walked to {place}.",
            f"{rng.choice(TIMES)}, {who.he} wanted to visit {place}.",
        ]
    )
    return [going, weather] if rng.random() < 0.7 else [going]


def _lost(rng: Random, who: Hero, pet: str, place: str) -> list[str]:
    thing = rng.choice(THINGS)
    other = hero(rng)
    while other.name == who.name:
        other = hero(rng)
    return [
        f"But {who.he} could not find {who.his} {thing.name}.",
        f"{capital(who.he)} looked everywhere, and {who.he} felt {rng.choice(FEELINGS_BAD)}.",
        f'"Where is my {thing.name}?" asked {who.name}.',
        rng.choice(
            [
                f'"I can help you," said {other.name}.',
                f"A {other.kind} named {other.name} came to help.",
                f"The {pet} began to look too.",
            ]
        ),
        f"At last they found the {thing.name} {thing.place}.",
    ]


def _meeting(rng: Random, who: Hero, pet: str, place: str) -> list[str]:
    animal = rng.choice([a for a in ANIMALS if a.name != pet])
    return [
        f"At {place}, {who.he} met {article(animal.name)}.",
        f'"{capital(animal.sound)}!" said the {animal.name}.',
        f"The {animal.name} was {rng.choice(FEELINGS_BAD)}.",
        rng.choice(
            [
                f"{who.name} gave the {animal.name} some {animal.food}.",
                f"{who.name} sat down next to the {animal.name} and sang a song.",
                f"{who.name} showed the {animal.name} the way home.",
            ]
        ),
        f"Soon the {animal.name} was {rng.choice(FEELINGS_GOOD)} again.",
    ]


def _making(rng: Random, who: Hero, pet: str, place: str) -> list[str]:
    food = rng.choice(FOODS)
    job = rng.choice(JOBS)
    return [
        f"There {who.he} saw a {job.name} with {job.tool}.",
        f'"What are you doing?" asked {who.name}.',
        f'"I am working," said the {job.name}. "Do you want to help me?"',
        f"{who.name} helped until the work was done.",
        f"The {job.name} thanked {who.him} and gave {who.him} {food.name}.",
        f"It was {food.taste}, and the {pet} got a piece too.",
    ]


def _gift(rng: Random, who: Hero, pet: str, place: str) -> list[str]:
    thing = rng.choice(THINGS)
    looks = f"{rng.choice(SIZES)} {rng.choice(COLORS)} {thing.name}"
    mother = rng.choice(["mother", "father", "grandmother", "grandfather", "teacher"])
    return [
        f"{capital(who.he)} found {article(looks)} there.",
        f'"I will give it to my {mother}," said {who.name}.',
        f"{capital(who.he)} carried the {thing.name} home with care.",
        f'{capital(who.his)} {mother} smiled and said, "Thank you, {who.name}."',
        f"Now the {thing.name} is {thing.place}.",
    ]


def _storm(rng: Random, who: Hero, pet: str, place: str) -> list[str]:
    return [
        f"Suddenly the sky became dark over {place}.",
        rng.choice(
            [
                "The rain fell hard and the wind was loud.",
                "Thunder rolled and the trees moved in the wind.",
                "Snow began to fall, and soon everything was white.",
            ]
        ),
        f"The {pet} was {rng.choice(FEELINGS_BAD)} and hid behind {who.name}.",
        f'"Do not be afraid," said {who.name}. "We will wait here together."',
        "After some time the sun came out again.",
    ]


def _counting(rng: Random, who: Hero, pet: str, place: str) -> list[str]:
    start, more = rng.randint(2, 10), rng.randint(1, 10)
    noun = rng.choice(["apples", "shells", "flowers", "stones", "leaves", "cookies", "coins"])
    return [
        f"{capital(who.he)} had {NUMBERS[start]} {noun} in {who.his} basket.",
        f"Then {who.he} found {NUMBERS[more]} more.",
        f'"How many do I have now?" asked {who.name}.',
        f"{capital(NUMBERS[start])} plus {NUMBERS[more]} is {NUMBERS[start + more]}.",
        f"So {who.name} had {NUMBERS[start + more]} {noun}.",
    ]


def _ending(rng: Random, who: Hero, pet: str) -> list[str]:
    good = rng.choice(FEELINGS_GOOD)
    return rng.choice(
        [
            [f"{who.name} and the {pet} went home, and they were {good}."],
            [f"That night {who.name} felt {good} and slept well."],
            [f"{who.name} learned that it is good to help a friend."],
            ["They laughed and played until the sun went down.", f"It was a {good} day."]
            if good in ("happy", "calm", "warm", "cheerful")
            else ["They laughed and played until the sun went down."],
            [f'"I am so {good}," said {who.name}.', "And they all went home for dinner."],
            ["From that day on, they were always kind to each other."],
        ]
    )


_EVENTS = [_lost, _meeting, _making, _gift, _storm, _counting]


def story(rng: Random) -> str:
    """A little story: who, where, one or two events, an ending."""
    who, place = hero(rng), rng.choice(PLACES)
    pet = rng.choice(ANIMALS).name
    events = rng.sample(_EVENTS, 2 if rng.random() < 0.3 else 1)
    lines = _opening(rng, who, pet) + _scene(rng, who, place)
    for event in events:
        lines += event(rng, who, pet, place)
    lines += _ending(rng, who, pet)
    half = len(lines) // 2
    if rng.random() < 0.3:
        return " ".join(lines[:half]) + "\n\n" + " ".join(lines[half:])
    return " ".join(lines)


def description(rng: Random) -> str:
    """Two to five facts about one animal, thing, food, job or word."""
    kind = rng.choice("atfjw")
    if kind == "a":
        a = rng.choice(ANIMALS)
        head = f"{capital(article(a.name))} is {article(a.trait)} animal."
        rest = [
            f"It lives {a.home}.",
            f"It eats {a.food}.",
            f"It has {a.legs} legs.",
            f"It says {a.sound}.",
            f"It can {a.skill}.",
            f"A young {a.name} is called {article(a.young)}.",
        ]
    elif kind == "t":
        t = rng.choice(THINGS)
        head = f"{capital(article(t.name))} is used to {t.use}."
        rest = [
            f"It is made of {t.material}.",
            f"You can often find it {t.place}.",
            f"It is {t.trait}.",
            f"Many people have {article(t.name)} at home.",
        ]
    elif kind == "f":
        f = rng.choice(FOODS)
        head = f"{capital(f.name)} is {f.kind}."
        rest = [
            f"It is {f.color}.",
            f"It tastes {f.taste}.",
            f"It comes from {f.source}.",
            "Many people like it.",
            f"You can eat it with {rng.choice(FOODS).name}.",
        ]
    elif kind == "w":
        word, meaning = rng.choice(MEANINGS)
        head = f"{capital(word)} means {meaning}."
        rest = [
            "It is an old word.",
            "It is a short word.",
            "I read it in a book.",
            "Many people know the word.",
        ]
    else:
        j = rng.choice(JOBS)
        head = f"{capital(article(j.name))} {j.work}."
        rest = [
            f"{capital(article(j.name))} works {j.place}.",
            f"{capital(article(j.name))} uses {j.tool}.",
            "It is important work.",
            f"My uncle is {article(j.name)}.",
        ]
    return " ".join([head, *rng.sample(rest, rng.randint(1, min(4, len(rest))))])


_SUBJECTS = listed(
    "soup bread hotel movie book song room garden shop meal chair lamp coat bicycle game show"
    " cake bed radio market train boat tea museum"
)
_GOOD = listed("wonderful great lovely excellent beautiful perfect pleasant fantastic delightful")
_BAD = listed("terrible awful boring poor ugly bad dreadful disappointing horrible")


def review(rng: Random) -> tuple[str, str]:
    """A short review and its label, "positive" or "negative"."""
    label = rng.choice(["positive", "negative"])
    good = label == "positive"
    subject, who = rng.choice(_SUBJECTS), hero(rng)
    word, again = rng.sample(_GOOD if good else _BAD, 2)
    lines = [
        f"The {subject} was {word}.",
        f"I think the {subject} is {word}.",
        f"I {'loved' if good else 'hated'} the {subject}.",
        f"What {article(word)} {subject}!",
        f"{who.name} said the {subject} was {word}.",
        f"This {subject} is {word} and {again}.",
    ]
    extra = (
        [
            "I would come again.", "It made me smile.", "It was worth the money.",
            f"Everything about it was {again}.", "I told all my friends about it.",
            "The people were friendly.", "I want to have it again.",
        ]
        if good
        else [
            "I will not come again.", "It made me angry.", "It was a waste of money.",
            f"Everything about it was {again}.", "I do not want it again.",
            "The people were rude.", "I wanted to leave.",
        ]
    )  # fmt: skip
    text = [rng.choice(lines), *rng.sample(extra, rng.randint(0, 2))]
    return " ".join(text), label


def request(rng: Random) -> tuple[str, str]:
    """A short instruction and a plain response."""
    kind = rng.randrange(8)
    who = hero(rng)
    if kind == 0:
        a = rng.choice(ANIMALS)
        return f"Write a sentence about {article(a.name)}.", (
            f"The {a.trait} {a.name} can {a.skill}."
        )
    if kind == 1:
        t = rng.choice(THINGS)
        return f"Describe {article(t.name)}.", (
            f"{capital(article(t.name))} is {t.trait} and made of {t.material}."
        )
    if kind == 2:
        names = rng.sample(ANIMALS, 3)
        return "Name three animals.", (
            f"Three animals are {article(names[0].name)}, {article(names[1].name)} and"
            f" {article(names[2].name)}."
        )
    if kind == 3:
        foods = rng.sample(FOODS, 3)
        return "Name three kinds of food.", (
            f"Three kinds of food are {foods[0].name}, {foods[1].name} and {foods[2].name}."
        )
    if kind == 4:
        return f"Say hello to {who.name}.", f"Hello, {who.name}! It is nice to meet you."
    if kind == 5:
        word, line = rng.choice(WEATHER)
        return f"Describe a {word} day.", line
    if kind == 6:
        colors = rng.sample(COLORS, 3)
        return "Name three colors.", f"Three colors are {colors[0]}, {colors[1]} and {colors[2]}."
    return "Tell me a short story.", story(rng)
