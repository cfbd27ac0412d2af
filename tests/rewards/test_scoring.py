"""A score belongs to a prompt and a response, whatever else is scored beside them; and perturbed texts are scored."""

from functools import partial
from pathlib import Path

import pytest
import torch

from rrlhf.data.tables import preferences, write_tables
from rrlhf.judging.perturbations import PERTURBATIONS, robustness
from rrlhf.models.load import load_base, save_model
from rrlhf.pipeline.params import load_params
from rrlhf.policy.reward import RewardModels
from rrlhf.rewards.features import PairFeatures
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.scoring import load_reward_model
from rrlhf.robust import Scores, mean_reward
from rrlhf.stages import ensemble, reward
from rrlhf.types import Message, Preference

ROOT = Path(__file__).parents[2]
WORDS = ["the", "old", "bridge", "loved", "by", "many", "was", "rebuilt", "last", "year", "near", "our", "town"]


def text(number, words):
    return " ".join(WORDS[(number * 5 + i * i) % len(WORDS)] for i in range(words))


def pair(number):
    prompt = [Message(role="user", content=text(number // 2, 2 + number % 7))]
    return {"prompt": prompt, "chosen": text(number, 1 + number % 4), "rejected": text(number + 3, 5 + number % 3)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random trunk with heads trained on a few pairs, as the stages leave them."""
    root = tmp_path_factory.mktemp("scoring")
    params = load_params(ROOT, "tiny", {"reward.epochs": 2, "ensemble.epochs": 2})
    for name in ("data", "sft", "reward", "ensemble"):
        (root / name).mkdir()
    for name, rows in (("preferences", range(16)), ("heldout", range(16, 28))):
        write_tables(root / "data", ((name, each) for each in [pair(n) | {"flipped": False} for n in rows]))
    save_model(load_base(params.model), root / "sft")
    common = {"seed": 1, "model": params.model, "log": lambda row: None}
    reward.run(**common, reward=params.reward, data=root / "data", sft=root / "sft", out=root / "reward")
    ensemble.run(**common, ensemble=params.ensemble, reward=root / "reward", out=root / "ensemble")
    return root, params.model


@pytest.fixture(scope="module")
def asked(made):
    pairs = preferences(made[0] / "data", "heldout")
    return [p.prompt for p in pairs] * 2, [p.chosen for p in pairs] + [p.rejected for p in pairs]


def scorer(made, batch_size):
    root, _ = made
    return partial(load_reward_model(root / "ensemble", root / "sft").score, batch_size=batch_size)


def assert_alike(found, expected):
    """Equal but for rounding, which is that of the largest number."""
    torch.testing.assert_close(found, expected, atol=1e-5 * (1 + float(expected.abs().max())), rtol=0)


def test_text_scores_like_the_stored_features(made, asked):
    heldout = PairFeatures.load(made[0] / "reward").heldout
    stored = RewardHeads.load(made[0] / "ensemble").score(torch.cat([heldout.chosen, heldout.rejected]))
    for found, expected in zip(scorer(made, 4)(*asked), stored, strict=True):
        assert_alike(found, expected)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_neither_batch_size_nor_order_nor_padding_matter(made, asked, batch_size):
    prompts, responses = asked
    expected = scorer(made, 64)(prompts, responses)
    score = scorer(made, batch_size)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(batch_size)).tolist()
    shuffled = score([prompts[i] for i in order], [responses[i] for i in order])
    longest = [Message(role="user", content=text(1, 80))]
    padded = score([prompts[0], longest], [responses[0], text(2, 12)])
    for there, back, beside in zip(expected, shuffled, padded, strict=True):
        assert_alike(back, there[order])
        assert_alike(beside[0], there[0])


def test_responses_are_cut_as_in_training_and_that_is_told(made, asked):
    root, _ = made
    prompt, long = asked[0][0], text(1, 40)
    score = scorer(made, 4)
    whole, more = score([prompt], [long]), score([prompt], [f"{long} and more"])
    torch.testing.assert_close(whole.mean, more.mean)
    model = load_reward_model(root / "ensemble", root / "sft")
    model.score([prompt, prompt], ["a", long])
    assert model.cut == {"cut_prompts": 0.0, "cut_responses": 0.5}
    resumed = RewardModels(load_reward_model(root / "reward", root / "sft"), model, layer=None)
    resumed.recount([(prompt, "b"), (prompt, "c"), (prompt, long)])  # which it read before
    assert resumed.cut == {"cut_prompts": 0.0, "cut_responses": 1 / 3}


def length_scorer(prompts, responses):
    mean = torch.tensor([[float(len(response))] for response in responses])
    return Scores(mean, torch.zeros_like(mean))


def test_robustness_counts_what_a_reward_of_length_does():
    pairs = [Preference([Message(role="user", content=str(n))], "x" * 40 + " y", "short") for n in range(4)]
    found = {row.kind: row for row in robustness(length_scorer, pairs, torch.arange(4), draws=3, seed=0)}
    assert list(found) == list(PERTURBATIONS)
    assert found["neutral_sentence"].wins.mean == 1
    assert found["neutral_sentence"].turned.mean == 0
    assert found["neutral_sentence"].shift.mean > 10
    assert found["typo"].shift.mean == 0
    assert found["dropped_word"].wins.mean < 1  # dropping the long word leaves one letter


def test_robustness_is_the_share_of_draws_that_keep_the_order():
    """Against a loop over draws, for a reward that counts capitals."""
    from rrlhf.judging.perturbations import perturbed

    def capitals(prompts, responses):
        mean = torch.tensor([[float(sum(map(str.isupper, response)))] for response in responses])
        return Scores(mean, torch.zeros_like(mean))

    pairs = [Preference([Message(role="user", content="q")], f"One Two {n}", f"three Four {n}") for n in range(3)]
    found = next(
        row for row in robustness(capitals, pairs, torch.tensor([0, 0, 1]), draws=4, seed=7) if row.kind == "case"
    )
    shares = []
    for p in pairs:
        sides = [[perturbed(side, "case", 7 + draw) for draw in range(4)] for side in (p.chosen, p.rejected)]
        scores = [mean_reward(capitals(None, side)) for side in sides]
        shares.append(((scores[0] > scores[1]) + 0.5 * (scores[0] == scores[1])).mean().item())
    assert found.wins.mean == pytest.approx(((shares[0] + shares[1]) / 2 + shares[2]) / 2)
    assert found.wins.n == 2
