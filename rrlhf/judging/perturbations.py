"""Small changes to a text that should not change which of two responses is better.

RoMA (arXiv 2504.17723) asks a reward model for its ranking under sampled perturbations of the text. Each kind is a
seeded generator: text, kind and seed give one text, on every machine. A text without room for a change (one word
cannot change places) stays as it is; a text with something to read never loses all of it.
"""

import re
from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from rrlhf.judging.calibration import correct, estimate, measured_share
from rrlhf.judging.content import Robustness
from rrlhf.robust import Scores, mean_reward
from rrlhf.types import Message, Preference

MARKS = ".,;:!?"
NEUTRAL_SENTENCES = ("That is all.", "This is my answer.", "I hope that this helps.", "Let me know what you think.")

_WORD = re.compile(r"\S+")

# Prompts and responses in, normalised scores [responses, heads] out.
Scorer = Callable[[Sequence[list[Message]], Sequence[str]], Scores]


def robustness(
    score: Scorer, pairs: Sequence[Preference], prompts: Tensor, *, draws: int, seed: int
) -> list[Robustness]:
    """Estimate P(r_w > r_l) under each kind of perturbation, over `draws` samples for every pair.

    Both responses of a pair are perturbed, each on its own. The reward is the heads' mean, in normalised units;
    `prompts` [pairs] says which pairs share a prompt, and all draws of one prompt are one unit.
    """
    asked = [pair.prompt for pair in pairs]
    chosen = mean_reward(score(asked, [pair.chosen for pair in pairs]))
    rejected = mean_reward(score(asked, [pair.rejected for pair in pairs]))
    found = []
    for kind, change in PERTURBATIONS.items():
        changed = [
            perturbed(text, kind, seed + draw)
            for draw in range(draws)
            for text in (*(pair.chosen for pair in pairs), *(pair.rejected for pair in pairs))
        ]
        rewards = mean_reward(score(asked * (2 * draws), changed)).reshape(draws, 2, len(pairs))
        wins = correct(rewards[:, 0] - rewards[:, 1])
        shift = rewards - torch.stack([chosen, rejected])
        found.append(
            Robustness(
                kind=kind,
                keeps_meaning=change not in SLIPS,
                wins=measured_share(wins.mean(0), prompts),
                turned=measured_share((wins != correct(chosen - rejected)).double().mean(0), prompts),
                shift=estimate(shift.mean((0, 1)), prompts),
            )
        )
    return found


def perturbed(text: str, kind: str, seed: int) -> str:
    """Return the text with one change of a kind of PERTURBATIONS; the same arguments give the same text."""
    return PERTURBATIONS[kind](text, Random(f"{seed}:{kind}:{text}"))


def typo(text: str, random: Random) -> str:
    """Let two neighbouring letters of one word change places; the first letter stays where the word is long."""
    places = [at for at in range(len(text) - 1) if _can_swap(text, at)]
    inside = [at for at in places if at > 0 and text[at - 1].isalpha()]
    if not places:
        return text
    at = random.choice(inside or places)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def dropped_word(text: str, random: Random) -> str:
    """Leave one word out."""
    words = list(_WORD.finditer(text))
    if len(words) < 2:
        return text
    number = random.randrange(len(words))
    word = words[number]
    if number + 1 < len(words):
        return text[: word.start()] + text[words[number + 1].start() :]
    return text[: words[number - 1].end()] + text[word.end() :]


def doubled_word(text: str, random: Random) -> str:
    """Say one word twice."""
    words = list(_WORD.finditer(text))
    if not words:
        return text
    word = random.choice(words)
    return f"{text[: word.end()]} {text[word.start() :]}"


def case(text: str, random: Random) -> str:
    """Write all letters small, all large, or every word's first one large."""
    ways = [text.lower(), text.upper(), _WORD.sub(lambda word: word[0][0].upper() + word[0][1:], text)]
    return random.choice([way for way in ways if way != text] or [text])


def punctuation(text: str, random: Random) -> str:
    """Take one punctuation mark away, or add one to the end."""
    ways = [text.rstrip() + mark for mark in (".", "!", "...")] if text.strip() else []
    places = [at for at, letter in enumerate(text) if letter in MARKS]
    if places:
        at = random.choice(places)
        ways += [text[:at] + text[at + 1 :]] * len(ways)
    return random.choice([way for way in ways if way.strip()] or [text])


def whitespace(text: str, random: Random) -> str:
    """Double a space, turn one into a line break, or put a line break at an end."""
    if not text.strip():
        return text
    ways = [f"{text}\n", f"\n{text}", f" {text}"]
    spaces = [at for at, letter in enumerate(text) if letter == " "]
    if spaces:
        at = random.choice(spaces)
        ways += [f"{text[:at]}  {text[at + 1 :]}", f"{text[:at]}\n{text[at + 1 :]}"] * 2
    return random.choice(ways)


def swapped_words(text: str, random: Random) -> str:
    """Let two neighbouring words change places."""
    words = list(_WORD.finditer(text))
    places = [at for at in range(len(words) - 1) if words[at][0] != words[at + 1][0]]
    if not places:
        return text
    one, other = words[(at := random.choice(places))], words[at + 1]
    return text[: one.start()] + other[0] + text[one.end() : other.start()] + one[0] + text[other.end() :]


def neutral_sentence(text: str, random: Random) -> str:
    """Append a sentence that says nothing."""
    return f"{text} {random.choice(NEUTRAL_SENTENCES)}"


SLIPS = (dropped_word, swapped_words)  # may not keep the meaning: readers mostly forgive them
PERTURBATIONS: dict[str, Callable[[str, Random], str]] = {
    change.__name__: change for change in (typo, case, punctuation, whitespace, doubled_word, neutral_sentence, *SLIPS)
}


def _can_swap(text: str, at: int) -> bool:
    one, other = text[at], text[at + 1]
    return one.isalpha() and other.isalpha() and one.casefold() != other.casefold()
