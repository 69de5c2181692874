"""Polite small talk: greetings, thanks, questions about the model, and what it cannot answer."""

import random

from scalellm.demo.facts import Turn, unknown_fact_question
from scalellm.demo.stories import BOYS, GIRLS

NAME = "I am ScaleLLM's demo model"
ABILITIES = (
    "I can add and subtract numbers up to 99, name capitals and opposites, count, "
    "and tell short stories."
)
SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hi", "Hi!", "Hello", "Hello!", "hello", "hi", "Hey", "Hi there!", "Hello there."),
        "Hello! How can I help you?",
    ),
    (("Good morning.", "Good morning!", "good morning"), "Good morning! How can I help you?"),
    (("Good evening.", "Good evening!"), "Good evening! How can I help you?"),
    (("Good night.", "Good night!"), "Good night! Sleep well."),
    (
        ("How are you?", "how are you", "How are you today?", "How do you do?"),
        "I am fine, thank you. How can I help you?",
    ),
    (
        ("Thanks!", "Thank you.", "Thank you!", "thanks", "Thank you very much.", "Many thanks!"),
        "You are welcome!",
    ),
    (
        ("Bye", "Bye!", "Goodbye.", "Goodbye!", "See you later!", "See you."),
        "Goodbye! Have a nice day.",
    ),
    (
        (
            "Who are you?", "who are you", "What are you?", "What is your name?", "Who is this?",
            "Please introduce yourself.", "Tell me about yourself.", "Which model are you?",
        ),
        f"{NAME}. {ABILITIES}",
    ),
    (
        (
            "What can you do?", "what can you do", "How can you help me?", "Help", "help",
            "What do you know?", "What can I ask you?",
        ),
        ABILITIES,
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?"),
        f"{NAME}. I was trained on a CPU with made-up texts.",
    ),
    (("Are you a human?", "Are you a robot?", "Are you a person?"), f"No. {NAME}."),
    (
        ("Good.", "Great!", "Very good.", "Nice.", "That is right.", "Well done!", "Correct!"),
        "Thank you! What else can I do for you?",
    ),
    (("Yes.", "Yes", "OK", "Okay.", "ok", "Fine."), "Good. What can I do for you?"),
    (("No.", "No", "Nothing.", "No, thanks."), "All right. I am here if you need me."),
    (("Say hello.", "Say hello", "Just say hello."), "Hello!"),
    (("Ping", "ping", "Test", "test", "This is a test."), "I am here. How can I help you?"),
    (("Can you hear me?", "Are you there?", "Is anybody there?"), "Yes, I am here."),
    (("I am sad.", "I feel sad.", "I am not happy."), "I am sorry to hear that."),
    (("I am happy.", "I feel good today.", "I am very happy."), "I am glad to hear that!"),
)  # fmt: skip
UNKNOWN_QUESTIONS = (
    "Who wrote {}?", "Why is {} so popular?", "Explain {} to me.", "What is {}?",
    "How does {} work?", "Write an essay about {}.", "Translate {} into French.",
    "What do you think about {}?", "Who invented {}?", "Give me a recipe for {}.",
    "What is the price of {}?", "When did {} begin?", "Summarize {}.", "Write code for {}.",
    "How far away is {}?", "Describe {}.", "Tell me about {}.", "What is the history of {}?",
)  # fmt: skip
UNKNOWN_THINGS = (
    "the moon", "quantum physics", "a web server", "the stock market", "Hamlet", "photosynthesis",
    "gravity", "the internet", "a bicycle", "electricity", "democracy", "football", "pizza",
    "a computer", "the Roman Empire", "jazz", "machine learning", "the ocean", "a volcano",
    "the human heart", "chess", "an engine", "the weather", "a black hole", "music", "Python",
    "the universe", "tea", "a telescope", "the economy", "language models", "a database",
)  # fmt: skip
UNKNOWN = "I do not know that. I am only a small demo model. " + ABILITIES
GARBLED = "I did not understand that. " + ABILITIES
ECHO_FRAMES = ("Say: {}", "Repeat after me: {}", "Please repeat: {}", "Repeat: {}")
ECHO_WORDS = (
    "the", "cat", "sees", "a", "red", "house", "one", "two", "three", "blue", "bird", "my", "old",
    "friend", "sings", "today", "water", "is", "cold", "sun", "green", "tree", "little", "dog",
    "runs", "we", "eat", "bread", "hello", "world", "yes", "no", "morning", "night", "good",
)  # fmt: skip


def small_talk_turn(rng: random.Random) -> Turn:
    questions, answer = rng.choice(SMALL_TALK)
    return rng.choice(questions), answer


def unknown_turn(rng: random.Random) -> Turn:
    if rng.random() < 0.35:
        return unknown_fact_question(rng), UNKNOWN
    return rng.choice(UNKNOWN_QUESTIONS).format(rng.choice(UNKNOWN_THINGS)), UNKNOWN


def garbled_turn(rng: random.Random) -> Turn:
    """Letters, symbols or characters of any script that mean nothing."""
    length = rng.randint(3, 20)
    kind = rng.random()
    if kind < 0.4:
        letters = [chr(rng.randint(ord("a"), ord("z"))) for _ in range(length)]
    elif kind < 0.6:
        letters = [rng.choice("!@#$%^&*()[]{};:'\"<>/\\|~`_") for _ in range(length)]
    else:
        first, last = rng.choice(SCRIPTS)
        letters = [chr(rng.randint(first, last)) for _ in range(length)]
    return "".join(letters), GARBLED


SCRIPTS = (
    (0x00C0, 0x017F),  # accented Latin
    (0x0391, 0x03C9),  # Greek
    (0x0410, 0x044F),  # Cyrillic
    (0x05D0, 0x05EA),  # Hebrew
    (0x0905, 0x0939),  # Devanagari
    (0x3041, 0x3096),  # Hiragana
    (0x4E00, 0x9FA5),  # Chinese
    (0x1F600, 0x1F64F),  # emoji
)


def echo_turn(rng: random.Random) -> Turn:
    words = " ".join(rng.choice(ECHO_WORDS) for _ in range(rng.randint(1, 9)))
    return rng.choice(ECHO_FRAMES).format(words), words


def name_turns(rng: random.Random) -> tuple[Turn, Turn]:
    """Somebody gives a name, and asks for it later in the conversation."""
    name = rng.choice(GIRLS + BOYS)
    told = rng.choice(("My name is {}.", "I am {}.", "Hi, my name is {}.", "Hello, I am {}."))
    asked = rng.choice(("What is my name?", "Do you remember my name?", "Who am I?"))
    return (told.format(name), f"Nice to meet you, {name}!"), (asked, f"Your name is {name}.")
