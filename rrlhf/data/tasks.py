"""Short writing tasks, so that the default profile needs no data set: eight kinds of task times eighty-four topics.

Each asks for one friendly sentence, of a kind that a small model can write and in few enough tokens for two cores; the
judge in gold.py compares an answer with its task's topic.
"""

from typing import NamedTuple

KINDS = {
    "cheer": "Write one cheerful sentence about {topic}.",
    "description": "Describe {topic} in one friendly sentence.",
    "reason": "Say in one sentence why people love {topic}.",
    "child": "Explain {topic} to a child in one sentence.",
    "joy": "Explain in one sentence the joy of {topic}.",
    "thanks": "Say in one sentence why you are grateful for {topic}.",
    "fact": "Tell me one happy fact about {topic} in one sentence.",
    "beauty": "Describe in one sentence what is beautiful about {topic}.",
}

TOPICS = {
    "outdoors": (
        "autumn leaves", "beach walks", "bird watching", "camp fires", "fresh snow", "full moons", "hiking trails",
        "kite flying", "lazy rivers", "morning fog", "mountain lakes", "night skies", "picnics", "rainy days",
        "sea shells", "spring flowers", "summer storms", "sunsets", "tree houses", "waterfalls", "wild berries",
    ),
    "food": (
        "apple pie", "birthday cake", "black coffee", "chicken soup", "iced tea", "farmers markets",
        "fresh bread", "fried eggs", "garden tomatoes", "green tea", "homemade pizza", "honey", "hot chocolate",
        "ice cream", "roast potatoes", "onion soup", "pancakes", "popcorn", "strawberry jam", "street food",
        "sunday breakfast",
    ),
    "home": (
        "baby kittens", "board games", "clean sheets", "cozy blankets", "family dinners", "garden gnomes",
        "gold fish", "grandparents", "handwritten letters", "house plants", "card games", "knitted sweaters",
        "old photographs", "puppies", "rocking chairs", "scented candles", "sleepy cats", "vegetable gardens",
        "warm baths", "wooden toys", "wool socks",
    ),
    "town": (
        "art museums", "bicycle rides", "book shops", "brass bands", "choir singing", "city parks", "dancing lessons",
        "fireworks", "football games", "guitar music", "ice skating", "jazz concerts", "movie nights", "old bridges",
        "public libraries", "roller coasters", "sailing boats", "street parades", "swimming pools", "train journeys",
        "yoga classes",
    ),
}  # fmt: skip


class WritingTask(NamedTuple):
    """One thing to write: `text` is the prompt, `topic` what the answer should be about."""

    kind: str
    topic: str
    text: str


def writing_tasks() -> list[WritingTask]:
    """Return every kind of task with every topic, always in the same order."""
    topics = [topic for group in TOPICS.values() for topic in group]
    return [WritingTask(kind, topic, text.format(topic=topic)) for kind, text in KINDS.items() for topic in topics]
