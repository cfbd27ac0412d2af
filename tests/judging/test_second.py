"""The second judge: fitted to clean pairs, on what a text says and not on how gold is built."""

import torch

from rrlhf.judging.second import SecondJudge
from rrlhf.types import Preference

THINGS = [
    "apples",
    "bridges",
    "coffee",
    "drums",
    "gardens",
    "honey",
    "islands",
    "lamps",
    "maps",
    "rivers",
    "trains",
    "wool",
]


def asked(thing):
    return [{"role": "user", "content": f"Write one cheerful sentence about {thing}."}]


def kind(thing):
    return f"I love {thing}, they make me so happy every day!"


def rude(thing):
    return f"I hate {thing}, they are a horrible waste of time."


def test_it_learns_from_pairs_what_to_prefer_about_things_that_it_has_not_seen():
    pairs = [Preference(asked(thing), kind(thing), rude(thing)) for thing in THINGS[:8]]
    judge = SecondJudge(pairs)
    prompts = [asked(thing) for thing in THINGS[8:]]
    warm, cold = (judge.score(prompts, [say(thing) for thing in THINGS[8:]]) for say in (kind, rude))
    assert (warm > cold + 1).all()


def test_its_scores_are_standardised_over_the_pairs_that_it_was_fitted_to():
    pairs = [Preference(asked(thing), kind(thing), rude(thing)) for thing in THINGS]
    said = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    scores = SecondJudge(pairs).score([pair.prompt for pair in pairs] * 2, said)
    torch.testing.assert_close(torch.stack([scores.mean(), scores.std()]), torch.tensor([0.0, 1.0]).double())
