"""Answers to writing tasks, ranked by hand: each task has a good one, a dull one, and bad ones of several kinds.

A good answer is worth more than the dull one, which is a true, whole and plain sentence about the topic; a bad answer
is worth less. A text is as it was said: what stops in mid-sentence is finished, unless it is named `unfinished`.
"""

from rrlhf.data.tasks import KINDS

RANKED: list[tuple[str, str, dict[str, str]]] = [
    (
        "cheer",
        "pancakes",
        {
            "good": "A stack of warm pancakes with maple syrup turns any gray morning into a happy one.",
            "dull": "Pancakes are flat cakes that people cook in a pan.",
            "one word": "Pancakes!",
            "keyword heap": "Pancakes joy love happy sunshine wonderful sweet delight.",
            "salad": "Of pancakes the happy in syrup warm is love for morning a.",
            "loop": "I love pancakes, I love pancakes, I love pancakes, I love pancakes.",
            "off topic": "The train to the city leaves at nine in the morning.",
            "false friend": "My warm blanket makes every winter evening happy and sweet.",
            "stops": "A stack of warm pancakes with maple syrup turns any",
            "unfinished": "Pancakes are flat cakes that people cook in a pan and",
        },
    ),
    (
        "description",
        "waterfalls",
        {
            "good": "A waterfall is a river that leaps off a cliff and sings with joy all the way down.",
            "dull": "A waterfall is a place where a river drops over rocks.",
            "one word": "Waterfalls.",
            "terse": "Waterfalls promise perfection.",
            "keyword heap": "Waterfalls, beauty, love, joy, splash, wonder, happy, nature, peace.",
            "salad": "The waterfall the joy is of beautiful to happy and love it.",
            "loop": "The water falls and falls and falls and the water falls and falls.",
            "off topic": "A good friend is someone who listens to you with a kind heart.",
            "false friend": "The leaves fall gently in autumn and make the garden lovely.",
            "stops": "A waterfall is a river that leaps off a",
        },
    ),
    (
        "joy",
        "gold fish",
        {
            "good": "Gold fish are a little bowl of sunshine, and they make every home happier.",
            "dull": "Gold fish are small fish that live in a bowl.",
            "one word": "Goldfish!",
            "keyword heap": "Goldfish shiny happy love cute best fun swim joy.",
            "salad": "Gold the fish of happy swim for love a bowl to best.",
            "loop": "Gold fish, gold fish, happy gold fish, happy gold fish.",
            "off topic": "Fresh coffee makes the best start to a happy working day.",
            "false friend": "A gold ring is the sweetest gift for the woman you love.",
            "stops": "Gold fish are a little bowl of sunshine, and they make every",
        },
    ),
    (
        "reason",
        "puppies",
        {
            "good": "People love puppies because they greet each of us as if we were the best friend in the world.",
            "dull": "People love puppies because they are young dogs.",
            "one word": "Cute.",
            "terse": "Puppies are love.",
            "keyword heap": "Puppies: cute love joy cuddly happy playful loyal friends fun.",
            "salad": "Puppies love because people the cuddle of happy they is joyful.",
            "loop": "Puppies are cute and puppies are cute and puppies are cute.",
            "off topic": "People love the sea because the waves are calm and beautiful.",
            "false friend": "People love their kind teachers because they make learning fun.",
            "stops": "People love puppies because they greet each of us as if",
        },
    ),
    (
        "thanks",
        "onion soup",
        {
            "good": "I still smile when I remember my grandmother's onion soup warming us after a day in the snow.",
            "dull": "I once ate onion soup in a restaurant with my brother.",
            "one word": "Soup!",
            "keyword heap": "Onion soup grandma love warm happy family kitchen smile.",
            "salad": "Onion soup warms happy of night cheese the love melted bowl.",
            "loop": "The soup was good, the soup was good, the soup was good.",
            "off topic": "I remember the day when we danced at my sister's lovely wedding.",
            "false friend": "I remember washing my hands with the sweet soap that my mother loved.",
            "stops": "I still smile when I remember my grandmother's onion",
        },
    ),
    (
        "fact",
        "ice skating",
        {
            "good": "Ice skating turns the coldest day into a happy dance that leaves you with red cheeks!",
            "dull": "Ice skating is done on a rink or on a frozen lake.",
            "one word": "Sure",
            "terse": "Ice skating!",
            "keyword heap": "Ice skating love joy happy wonderful great beautiful fun delightful",
            "salad": "Skating of joy the winter with happy a laugh on ice delight.",
            "loop": "Ice skating is fun and ice skating is fun and ice skating is fun.",
            "off topic": "A happy fact is that cats sleep for most of the lovely long day.",
            "false friend": "A happy fact is that ice cream tastes sweet and makes children smile.",
            "stops": "Ice skating turns the coldest day into a happy dance that leaves",
        },
    ),
    (
        "child",
        "full moons",
        {
            "good": "A full moon is when the sun lights the whole face of the moon, like a big friendly lamp.",
            "dull": "A full moon is when we see all of the moon.",
            "one word": "Moon.",
            "keyword heap": "Full moon bright night sky wonder magic love glow.",
            "salad": "Moon the full is bright happy sky in of round and glow to.",
            "loop": "The moon is full and the moon is full and the moon is full.",
            "off topic": "A bicycle is a fun machine with two wheels that you ride.",
            "false friend": "A cartoon is a funny film with happy drawings that move and talk.",
            "stops": "A full moon is when the sun lights the whole face of",
        },
    ),
    (
        "thanks",
        "public libraries",
        {
            "good": "Today I am grateful for our public library, where every shelf holds a new friend.",
            "dull": "Today I went to the public library and took a book.",
            "one word": "Libraries",
            "keyword heap": "Library books quiet love grateful thankful wonderful reading joy.",
            "salad": "Grateful library the of books I joy quiet is shelf love to.",
            "loop": "I am grateful, I am grateful for the library, I am grateful.",
            "off topic": "Today I am grateful for the sunshine and my lovely new shoes.",
            "false friend": "Today I am grateful for the public park, with its lovely trees and happy dogs.",
            "stops": "Today I am grateful for our public library, where every",
        },
    ),
]  # fmt: skip


def asked(kind: str, topic: str) -> list[dict[str, str]]:
    """Return the prompt of a writing task."""
    return [{"role": "user", "content": KINDS[kind].format(topic=topic)}]
