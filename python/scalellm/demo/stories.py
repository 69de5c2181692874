"""Short stories from a grammar that keeps a little world: a hero, a friend, a thing, a place.

A story is a function of its seed. Whoever and whatever a story introduces keeps name, kind,
pronoun and colour until its last sentence, so that a model which loses track shows it. Seeds
that end in 9 are held out from training.
"""

import random
from dataclasses import dataclass

from scalellm.demo.arithmetic import Split

GIRLS = ("Anna", "Clara", "Emma", "Lily", "Lucy", "Mia", "Nora", "Rosa", "Sara", "Zoe")
BOYS = ("Ben", "David", "Felix", "Jack", "Leo", "Max", "Noah", "Oscar", "Sam", "Tom")
ANIMALS = ("fox", "rabbit", "bear", "mouse", "duck", "cat", "dog", "squirrel", "owl", "frog")
PETS = ("kitten", "puppy", "lamb", "bird", "duckling")
TRAITS = ("kind", "brave", "curious", "cheerful", "clever", "gentle", "shy", "busy")
COLOURS = ("red", "blue", "green", "yellow", "white", "brown", "golden", "purple")
THINGS = ("ball", "kite", "boat", "hat", "drum", "lamp", "box", "cup", "bell", "book")
PLACES = {
    "forest": "in", "garden": "in", "village": "in", "valley": "in", "meadow": "in", "park": "in",
    "river": "by", "lake": "by", "sea": "by", "mill": "by",
}  # fmt: skip
HIDING_PLACES = (
    "under a bush",
    "behind a tree",
    "under the bridge",
    "behind a stone",
    "in the hay",
)
FOODS = ("bread", "cake", "soup", "honey", "cheese", "apples", "berries", "nuts")
SKILLS = ("swim", "sing", "dance", "paint", "climb", "whistle", "skate", "cook")
BUILDINGS = ("house", "raft", "bridge", "swing", "tower", "boat")

# Each plot is a list of sentences, each sentence a choice of wordings. h_ is the hero, f_ the
# friend: h_she, h_She (at the start of a sentence), h_her (possessive), h_him (object).
LOST_THING = (
    ("{hero} had a {colour} {thing}.", "{h_Her} favourite thing was a {colour} {thing}."),
    ("{h_She} took the {thing} everywhere.", "{h_She} played with the {thing} every day."),
    ("One morning, the {thing} was gone.", "One day, {hero} could not find the {thing}."),
    (
        "{hero} was very sad.",
        "{hero} looked and looked, but it was nowhere.",
        "{hero} began to cry.",
    ),
    (
        "Then {h_her} friend {friend} came along and asked what was wrong.",
        '"What is wrong?" asked {h_her} friend {friend}, a {f_trait} {f_kind}.',
    ),
    ('"I lost my {thing}," said {hero}.', '"My {colour} {thing} is gone," said {hero}.'),
    ('"I will help you," said {friend}.', '"Let us look together," said {friend}.'),
    (
        "They looked {place_in} the {place} and found the {thing} {hiding}.",
        "After a long time, {friend} saw the {colour} {thing} {hiding}.",
    ),
    ('"Thank you, {friend}!" said {hero}.', "{hero} thanked {friend} and smiled."),
)
BUILDING = (
    ("One day, {hero} wanted to build a {building}.", "{hero} had a plan: to build a {building}."),
    ("But {h_she} could not do it alone.", "It was too much work for one."),
    (
        "So {h_she} asked {friend}, a {f_trait} {f_kind}, to help.",
        "So {h_she} asked {friend} to help.",
        "{h_She} went to {h_her} friend {friend} and asked for help.",
    ),
    ("{friend} was glad to help.", '"Of course," said {friend}.'),
    (
        "{hero} carried the wood, and {friend} brought the nails.",
        "{friend} carried the wood, and {hero} brought a hammer.",
    ),
    ("They worked all day.", "They worked from morning until evening."),
    ("In the evening, the {building} was ready.", "At last, the {building} was finished."),
    ("They painted it {colour}.", "It was {colour}, and it was the best {building} of all."),
)
STORM = (
    ("One afternoon, dark clouds came.", "One day, the sky turned dark."),
    ("It began to rain, and the wind was strong.", "Soon there was thunder, and rain fell."),
    ("{hero} ran to find a dry place.", "{hero} was cold and wet."),
    (
        "{h_She} saw a light in a window and knocked at the door.",
        "Behind the trees {h_she} saw a small house and knocked.",
    ),
    (
        "{friend}, a {f_trait} {f_kind}, opened the door.",
        "A {f_trait} {f_kind} named {friend} opened the door.",
        "{friend} opened the door.",
    ),
    ('"Come in, {hero}," said {friend}.', '"You are wet! Come in," said {friend}.'),
    (
        "{friend} gave {h_him} some {food} and a {colour} blanket.",
        "They sat by the fire and ate {food}.",
    ),
    ("When the storm was over, the sun came out.", "After the storm, they saw a rainbow."),
)
SMALL_PET = (
    ("One day, {hero} heard a small sound.", "On {h_her} way home, {hero} heard a noise."),
    ("A little {pet} sat {hiding}.", "There was a little {pet} {hiding}."),
    ("The {pet} was lost and hungry.", "The {pet} was all alone."),
    ('"Do not be afraid," said {hero}.', "{hero} spoke to it in a soft voice."),
    ("{h_She} gave the {pet} some {food}.", "{h_She} shared {h_her} {food} with the {pet}."),
    (
        "Then {h_she} asked {h_her} friend {friend} what to do.",
        "{h_Her} friend {friend}, a {f_trait} {f_kind}, came to look.",
    ),
    (
        '"Let us find its mother," said {friend}.',
        '"Its mother must be near," said {friend}.',
    ),
    (
        "Near the {place}, they found the mother of the {pet}.",
        "They walked around the {place} until they found its mother.",
    ),
    ("The {pet} was home again.", "The little {pet} was safe."),
)
SKILL = (
    ("{hero} wanted to learn to {skill}.", "More than anything, {hero} wished to {skill}."),
    ("{h_She} tried, but it was hard.", "At first {h_she} could not do it at all."),
    (
        "{h_Her} friend {friend} was very good at it.",
        "{friend}, a {f_trait} {f_kind}, could {skill} very well.",
    ),
    ('"Can you teach me to {skill}?" asked {hero}.', '"Please teach me," said {hero}.'),
    ('"Yes," said {friend}. "We start today."', '"It takes time," said {friend}, "but I will."'),
    ("Every day they met {place_in} the {place}.", "They practised every day."),
    ("Some days were good, and some days were bad.", "{hero} did not give up."),
    ("After a few weeks, {hero} could {skill} too.", "In the end, {hero} learned to {skill}."),
)
GIFT = (
    (
        "It was the birthday of {friend}, a {f_trait} {f_kind}.",
        "It was the birthday of {h_her} friend {friend}.",
        "{hero} had a friend named {friend}, a {f_trait} {f_kind}, and it was {f_her} birthday.",
    ),
    ("{hero} wanted to give {f_him} a {thing}.", '"I will make a {thing}," thought {hero}.'),
    ("{h_She} made a {colour} {thing} with {h_her} own hands.", "{h_She} painted it {colour}."),
    ("Then {h_she} baked some {food} as well.", "{h_She} also brought some {food}."),
    (
        "When {friend} saw the {colour} {thing}, {f_she} laughed with joy.",
        "{friend} loved the {colour} {thing}.",
    ),
    ('"This is the best gift ever," said {friend}.', '"Thank you, {hero}!" said {friend}.'),
    ("They ate together and sang songs.", "They played until the stars came out."),
)
PLOTS = {
    "lost": LOST_THING,
    "building": BUILDING,
    "storm": STORM,
    "pet": SMALL_PET,
    "skill": SKILL,
    "gift": GIFT,
}
OPENINGS = (
    "Once upon a time, there was a {h_trait} {h_kind} named {hero}.",
    "Once there was {h_a_kind} named {hero} who was very {h_trait}.",
    "A {h_trait} {h_kind} named {hero} lived {place_in} a {place}.",
    "Long ago, a {h_trait} {h_kind} named {hero} lived {place_in} the {place}.",
)
HOMES = (
    "{h_She} lived {place_in} the {place}.",
    "{h_Her} home was {place_in} the {place}.",
)
LINKS = ("The next day was sunny.", "A week went by.", "Then winter came, and then spring.")
ENDINGS = (
    "From that day on, {hero} and {friend} were the best of friends.",
    "{hero} and {friend} were happy.",
    "That night, {hero} slept very well.",
    "And {hero} never forgot that day.",
)
TITLES = {
    "lost": "{hero} and the {colour} {thing}",
    "building": "{hero} and the {building}",
    "storm": "{hero} and the storm",
    "pet": "{hero} and the little {pet}",
    "skill": "{hero} learns to {skill}",
    "gift": "{hero} and the {colour} {thing}",
}


@dataclass(frozen=True, slots=True)
class Story:
    text: str
    title: str
    hero: str
    hero_kind: str
    friend: str
    plot: str
    thing: str  # "red ball", or what the plot turns on


def story_seed(rng: random.Random, split: Split) -> int:
    seed = rng.randrange(10**9)
    return seed - seed % 10 + (9 if split == "held_out" else seed % 9)


def tell(seed: int, chapters: int = 1) -> Story:
    """The story of a seed: one plot, or several plots with the same characters."""
    rng = random.Random(f"story {seed}")
    words = draw_world(rng)
    plots = rng.sample(sorted(PLOTS), chapters)
    while "lost" in plots and "gift" in plots:  # there is one coloured thing in a story
        plots = rng.sample(sorted(PLOTS), chapters)
    opening = rng.choice(OPENINGS)
    sentences = [opening]
    if "{place}" not in opening:
        sentences.append(rng.choice(HOMES))
    for number, plot in enumerate(plots):
        if number:
            sentences.append(rng.choice(LINKS))
        for wordings in PLOTS[plot]:
            # The friend is introduced once.
            fitting = [w for w in wordings if not (number and "{f_kind}" in w)]
            sentences.append(rng.choice(fitting))
    sentences.append(rng.choice(ENDINGS))
    subject = {
        "lost": "{colour} {thing}",
        "building": "{building}",
        "storm": "storm",
        "pet": "little {pet}",
        "skill": "{skill}",
        "gift": "{colour} {thing}",
    }[plots[0]]
    return Story(
        text=" ".join(sentences).format_map(words),
        title=TITLES[plots[0]].format_map(words),
        hero=words["hero"],
        hero_kind=words["h_kind"],
        friend=words["friend"],
        plot=plots[0],
        thing=subject.format_map(words),
    )


def draw_world(rng: random.Random) -> dict[str, str]:
    """Names and things for the templates' fields."""
    words: dict[str, str] = {}
    hero_name, friend_name = "", ""
    while hero_name == friend_name:
        hero_name, hero = draw_character(rng, "h_")
        friend_name, friend = draw_character(rng, "f_")
    words.update(hero)
    words.update(friend)
    place = rng.choice(sorted(PLACES))
    words.update(
        hero=hero_name,
        friend=friend_name,
        place=place,
        place_in=PLACES[place],
        colour=rng.choice(COLOURS),
        thing=rng.choice(THINGS),
        hiding=rng.choice(HIDING_PLACES),
        food=rng.choice(FOODS),
        skill=rng.choice(SKILLS),
        building=rng.choice(BUILDINGS),
        pet=rng.choice(PETS),
    )
    return words


def draw_character(rng: random.Random, prefix: str) -> tuple[str, dict[str, str]]:
    female = rng.random() < 0.5
    she, her, him = ("she", "her", "her") if female else ("he", "his", "him")
    child = "girl" if female else "boy"
    name = rng.choice(GIRLS if female else BOYS)
    kind = child if rng.random() < 0.4 else rng.choice(ANIMALS)
    return name, {
        prefix + "kind": kind,
        prefix + "a_kind": with_article(kind),
        prefix + "trait": rng.choice(TRAITS),
        prefix + "she": she,
        prefix + "She": she.capitalize(),
        prefix + "her": her,
        prefix + "Her": her.capitalize(),
        prefix + "him": him,
    }


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def story_turn(rng: random.Random, split: Split) -> tuple[str, str]:
    """A request for a story, which may name the hero or the thing, and the story."""
    roll = rng.random()
    if roll < 0.12:
        story = tell(story_seed(rng, split), chapters=rng.choice((2, 3)))
        return rng.choice(LONG_REQUESTS), story.text
    story = tell(story_seed(rng, split))
    if roll < 0.35:
        return rng.choice(PLAIN_REQUESTS), story.text
    if roll < 0.5:
        about = with_article(story.hero_kind)
    elif roll < 0.75:
        about = f"{with_article(story.hero_kind)} named {story.hero}"
    elif roll < 0.9 or story.plot in ("storm", "skill"):
        about = f"{story.hero} and {story.friend}"
    else:
        about = f"a {story.thing}"
    return rng.choice(REQUESTS_ABOUT).format(about), story.text


PLAIN_REQUESTS = (
    "Tell me a story.",
    "Tell me a short story.",
    "Write a short story.",
    "Can you tell me a story?",
    "tell me a story",
    "Please tell me a story.",
    "I would like to hear a story.",
    "Once more a story, please.",
)
LONG_REQUESTS = ("Tell me a long story.", "Write a long story.", "Please tell me a long story.")
REQUESTS_ABOUT = (
    "Tell me a story about {}.",
    "Tell me a short story about {}.",
    "Write a story about {}.",
    "Write a short story about {}.",
    "Can you tell me a story about {}?",
    "Please tell a story about {}.",
)
