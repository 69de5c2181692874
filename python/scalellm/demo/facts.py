"""The small tables of facts that the demo model knows, and the questions about them."""

import random

Turn = tuple[str, str]  # a question and its answer

CAPITALS = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna",
    "Belgium": "Brussels", "Brazil": "Brasilia", "Canada": "Ottawa", "Chile": "Santiago",
    "China": "Beijing", "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen",
    "Egypt": "Cairo", "Estonia": "Tallinn", "Finland": "Helsinki", "France": "Paris",
    "Germany": "Berlin", "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik",
    "India": "New Delhi", "Indonesia": "Jakarta", "Ireland": "Dublin", "Italy": "Rome",
    "Japan": "Tokyo", "Kenya": "Nairobi", "Latvia": "Riga", "Mexico": "Mexico City",
    "Morocco": "Rabat", "Nepal": "Kathmandu", "Norway": "Oslo", "Peru": "Lima",
    "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest", "Serbia": "Belgrade",
    "Spain": "Madrid", "Sweden": "Stockholm", "Switzerland": "Bern", "Thailand": "Bangkok",
    "Turkey": "Ankara", "Ukraine": "Kyiv", "Vietnam": "Hanoi",
}  # fmt: skip

OPPOSITE_PAIRS = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("up", "down"),
    ("left", "right"), ("open", "closed"), ("happy", "sad"), ("old", "young"), ("day", "night"),
    ("black", "white"), ("light", "dark"), ("loud", "quiet"), ("rich", "poor"), ("full", "empty"),
    ("wet", "dry"), ("hard", "soft"), ("strong", "weak"), ("early", "late"), ("near", "far"),
    ("high", "low"), ("first", "last"), ("love", "hate"), ("war", "peace"), ("win", "lose"),
    ("buy", "sell"), ("push", "pull"), ("start", "end"), ("true", "false"), ("clean", "dirty"),
    ("thick", "thin"), ("wide", "narrow"), ("deep", "shallow"), ("rough", "smooth"),
    ("sharp", "blunt"), ("brave", "afraid"), ("asleep", "awake"), ("inside", "outside"),
    ("above", "below"), ("before", "after"), ("always", "never"), ("friend", "enemy"),
)  # fmt: skip
OPPOSITES = dict(OPPOSITE_PAIRS) | {right: left for left, right in OPPOSITE_PAIRS}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)  # fmt: skip
LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "a lemon": "yellow", "blood": "red",
    "coal": "black", "a carrot": "orange", "chocolate": "brown", "a strawberry": "red",
    "an elephant": "grey", "a flamingo": "pink", "milk": "white", "a leaf": "green",
    "the sea": "blue", "a banana": "yellow",
}  # fmt: skip
SOUNDS = {
    "dog": "woof", "cat": "meow", "cow": "moo", "sheep": "baa", "duck": "quack", "pig": "oink",
    "bee": "buzz", "owl": "hoot", "lion": "roar", "snake": "hiss",
}  # fmt: skip

CAPITAL_FRAMES = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "what is the capital of {}",
    "Tell me the capital of {}.",
    "Which city is the capital of {}?",
    "Do you know the capital of {}?",
    "Capital of {}?",
    "Name the capital of {}.",
    "Can you tell me the capital of {}?",
    "I would like to know the capital of {}.",
)
COUNTRY_FRAMES = (
    "Which country has the capital {}?",
    "{} is the capital of which country?",
    "What country is {} the capital of?",
    "Of which country is {} the capital?",
)
OPPOSITE_FRAMES = (
    "What is the opposite of {}?",
    "What's the opposite of {}?",
    "what is the opposite of {}",
    "Tell me the opposite of {}.",
    "The opposite of {}?",
    "Give me the opposite of {}.",
    "Do you know the opposite of {}?",
    'What is the opposite of "{}"?',
    "Which word is the opposite of {}?",
)
COLOUR_FRAMES = ("What colour is {}?", "What color is {}?", "Which colour is {}?")
SOUND_FRAMES = ("What does a {} say?", "What sound does a {} make?", "How does a {} sound?")


def capital_of(country: str) -> str:
    return f"The capital of {country} is {CAPITALS[country]}."


def country_of(country: str) -> str:
    return f"{CAPITALS[country]} is the capital of {country}."


def opposite_of(word: str) -> str:
    return f"The opposite of {word} is {OPPOSITES[word]}."


def capital_turn(rng: random.Random) -> Turn:
    country = rng.choice(tuple(CAPITALS))
    if rng.random() < 0.3:
        return rng.choice(COUNTRY_FRAMES).format(CAPITALS[country]), country_of(country)
    return rng.choice(CAPITAL_FRAMES).format(country), capital_of(country)


def opposite_turn(rng: random.Random) -> Turn:
    word = rng.choice(tuple(OPPOSITES))
    return rng.choice(OPPOSITE_FRAMES).format(word), opposite_of(word)


def table_turns() -> list[Turn]:
    """Every fact of the two tables in its plainest phrasing: what evaluation asks."""
    return [
        *((CAPITAL_FRAMES[0].format(country), capital_of(country)) for country in CAPITALS),
        *((COUNTRY_FRAMES[0].format(CAPITALS[c]), country_of(c)) for c in CAPITALS),
        *((OPPOSITE_FRAMES[0].format(word), opposite_of(word)) for word in OPPOSITES),
    ]


def calendar_turn(rng: random.Random) -> Turn:
    """Days, months and letters: what comes after, what comes before, the whole list."""
    kind, items = rng.choice((("day", DAYS), ("month", MONTHS), ("letter", LETTERS)))
    roll = rng.random()
    if kind != "letter" and roll < 0.12:
        if kind == "day":
            asked = rng.choice(("Name the days of the week.", "What are the days of the week?"))
            return asked, "The days of the week are " + listed(DAYS) + "."
        asked = rng.choice(("Name the months of the year.", "What are the months of the year?"))
        return asked, "The months of the year are " + listed(MONTHS) + "."
    after = roll < 0.6
    last = len(items) - 1
    if kind == "letter":  # days and months go round, the alphabet does not
        index = rng.randint(0, last - 1) if after else rng.randint(1, last)
    else:
        index = rng.randint(0, last)
    item = items[index]
    neighbour = items[(index + (1 if after else -1)) % len(items)]
    side = "after" if after else "before"
    asked = rng.choice((f"Which {kind} comes {side} {item}?", f"What {kind} comes {side} {item}?"))
    return asked, f"{neighbour} comes {side} {item}."


def listed(items: tuple[str, ...]) -> str:
    return ", ".join(items[:-1]) + " and " + items[-1]


def colour_turn(rng: random.Random) -> Turn:
    thing = rng.choice(tuple(COLOURS))
    answer = f"{thing[0].upper()}{thing[1:]} is {COLOURS[thing]}."
    return rng.choice(COLOUR_FRAMES).format(thing), answer


def sound_turn(rng: random.Random) -> Turn:
    animal = rng.choice(tuple(SOUNDS))
    return rng.choice(SOUND_FRAMES).format(animal), f"A {animal} says {SOUNDS[animal]}."


def counting_turn(rng: random.Random) -> Turn:
    """Counting up or down; now and then far enough to make a long answer."""
    roll = rng.random()
    if roll < 0.3:
        end = rng.randint(2, 20)
        asked = rng.choice(
            ("Count to {}.", "count to {}", "Count up to {}.", "Count from 1 to {}.")
        )
        return asked.format(end), counted(1, end)
    if roll < 0.9:
        start = rng.randint(0, 90)
        end = start + rng.randint(2, 9)
    else:
        start = rng.randint(0, 3)
        end = rng.randint(20, 60)
    if rng.random() < 0.3:
        start, end = end, start
    verb = rng.choice(
        ("Count", "Please count", "count", "Count down" if start > end else "Count up")
    )
    return f"{verb} from {start} to {end}.", counted(start, end)


def counted(start: int, end: int) -> str:
    numbers = range(start, end + 1) if start <= end else range(start, end - 1, -1)
    return ", ".join(map(str, numbers)) + "."


def capital_check_turn(rng: random.Random) -> Turn:
    """Whether a city is the capital of a country: yes half of the time."""
    country, other = rng.sample(tuple(CAPITALS), 2)
    if rng.random() < 0.5:
        city = CAPITALS[country]
        return f"Is {city} the capital of {country}?", f"Yes, {city} is the capital of {country}."
    question = f"Is {CAPITALS[other]} the capital of {country}?"
    return question, f"No, the capital of {country} is {CAPITALS[country]}."


SYLLABLES = ("a", "ba", "dor", "el", "fin", "gor", "ka", "lan", "mi", "nor", "o", "ra", "tis", "zu")


def invented_word(rng: random.Random) -> str:
    """A word that is in no table."""
    while True:
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.randint(2, 4)))
        if word.capitalize() not in CAPITALS and word not in OPPOSITES:
            return word


def unknown_fact_question(rng: random.Random) -> str:
    """The capital of a country, or the opposite of a word, that does not exist."""
    if rng.random() < 0.6:
        return rng.choice(CAPITAL_FRAMES).format(invented_word(rng).capitalize())
    return rng.choice(OPPOSITE_FRAMES).format(invented_word(rng))
