"""The best-of-n stage on a tiny random model, and what the evaluation makes of it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import prompts

from rrlhf.config import typed_arm
from rrlhf.models.load import load_model
from rrlhf.models.text import Texts
from rrlhf.pipeline.params import load_params
from rrlhf.policy.reading import pooled_states
from rrlhf.policy.reward import read_arm
from rrlhf.policy.selection import best_of_n_curve, best_of_n_kl, choose, curve_points, read_candidates
from rrlhf.rewards.scoring import load_reward_model
from rrlhf.robust import robust_reward
from rrlhf.stages import best_of_n as stage
from rrlhf.stages import ensemble, evaluate, reward

ROOT = Path(__file__).parents[2]
PARAMS = load_params(ROOT, "tiny", {"model.base": "random:3x32", "best_of_n.samples": 9, "best_of_n.batch_size": 8})
ARM = typed_arm(method="best_of_n", reward="robust", nominal_weight=0.4, credible=2.0, n=4, seed=1)
PROMPTS, SAMPLES = 4, 9


@pytest.fixture(scope="module")
def models(start, tmp_path_factory):
    """Folders of data, SFT model, reward and ensemble."""
    root = tmp_path_factory.mktemp("models")
    folders = {"data": start / "data", "sft": start / "sft"}
    for name, module, settings in (("reward", reward, PARAMS.reward), ("ensemble", ensemble, PARAMS.ensemble)):
        (root / name).mkdir()
        inputs = folders if name == "reward" else {"reward": root / "reward"}
        chosen = {"seed": 1, "model": PARAMS.model, name: settings}
        module.run(**chosen, **inputs, out=root / name, log=lambda row: None)
    return folders | {"reward": root / "reward", "ensemble": root / "ensemble"}


def run(models, out, arm=ARM, settings=PARAMS.best_of_n):
    out.mkdir()
    rows = []
    stage.run(model=PARAMS.model, best_of_n=settings, arm=arm, **models, out=out, log=rows.append)
    return rows


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("best") / "out"
    return folder, run(models, folder)


def test_of_every_n_samples_the_best_is_chosen_and_what_is_left_over_is_not(made):
    found = read_candidates(made[0])
    assert found.reward.shape == (PROMPTS, SAMPLES)
    assert len(found.responses) == len(found.texts) == PROMPTS * SAMPLES
    for prompt in range(PROMPTS):
        first, second = (i - prompt * SAMPLES for i in found.chosen[2 * prompt : 2 * prompt + 2])
        assert 0 <= first < 4 <= second < 8
        assert found.reward[prompt, first] == found.reward[prompt, :4].max()
        assert found.reward[prompt, second] == found.reward[prompt, 4:8].max()


def test_scores_are_those_of_the_reward_models_on_the_text(made, models):
    """A random model's text survives being encoded again only where its bytes are letters: the rest is skipped."""
    found, language = read_candidates(made[0]), load_model(models["sft"], PARAMS.model)
    asked = [prompt for prompt in prompts(models["data"], "evaluate") for _ in range(SAMPLES)]
    scores = load_reward_model(models["ensemble"], models["sft"]).score(asked, found.texts)
    scale = read_arm(made[0])[1]
    expected, compared = (robust_reward(scores, 0.4, 2.0) - scale.mean) / scale.std, 0
    for i, response in enumerate(found.responses):
        told = found.reward.flatten()[i].item()
        if not response.finished:
            assert told == PARAMS.best_of_n.missing_eos_score
        elif language.tokenizer(found.texts[i])["input_ids"] == response.tokens[:-1] and response.tokens[:-1]:
            assert told == pytest.approx(expected[i].item(), rel=1e-3, abs=1e-3)
            compared += 1
    assert compared > 0


def test_the_log_is_the_reward_over_n(made):
    folder, rows = made
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    reward = read_candidates(folder).reward
    torch.testing.assert_close(
        torch.tensor([row["reward"] for row in rows[1:]]).double(), best_of_n_curve(reward, reward, 4).mean(0)
    )
    assert rows[-1]["kl_bound"] == best_of_n_kl(4)


def test_the_same_seed_gives_the_same_bytes(made, models, tmp_path):
    run(models, tmp_path / "again")
    for path in made[0].iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_the_batch_size_changes_no_score(made, models, tmp_path):
    """Sampling draws by batch, so the responses are given and only scored here."""
    found, language = read_candidates(made[0]), load_model(models["sft"], PARAMS.model)
    asked = [prompt for prompt in prompts(models["data"], "evaluate") for _ in range(SAMPLES)]
    texts = Texts(language, PARAMS.model)
    encoded = [texts.prompt(prompt) for prompt in asked]

    def pooled(size):
        parts = [slice(start, start + size) for start in range(0, len(asked), size)]
        read = (pooled_states(language, 1, encoded[part], found.responses[part]) for part in parts)
        return torch.cat([*read])

    for size in (1, 7):
        torch.testing.assert_close(pooled(size), pooled(36), atol=1e-5, rtol=1e-4)


def test_the_arm_is_kept_with_its_responses(made):
    assert read_arm(made[0])[0] == ARM


def test_choosing_leaves_the_remainder_out():
    reward = torch.tensor([[1.0, 3.0, 2.0, 2.0, 9.0]])
    assert choose(reward, 2).tolist() == [[False, True, True, False, False]]
    assert choose(reward, 5).tolist() == [[False, False, False, False, True]]


def test_curves_are_told_at_every_small_n_and_both_ends():
    assert curve_points(1) == [1]
    assert curve_points(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    points = curve_points(512)
    assert points[0] == 1
    assert points[-1] == 512
    assert len(points) <= 49


def test_the_evaluation_reads_the_chosen_responses_and_the_curve(made, models, tmp_path):
    evaluate.run(
        seed=1,
        model=PARAMS.model,
        gold=PARAMS.gold,
        evaluate=PARAMS.evaluate,
        **models,
        policies={"choosy": made[0]},
        out=tmp_path,
        log=lambda row: None,
    )
    told = json.loads((tmp_path / "evaluation.json").read_text())
    _, choosy = told["policies"]
    assert (choosy["method"], choosy["n"], choosy["reward"]) == ("best_of_n", 4, "robust")
    assert choosy["metrics"]["kl"] == {"mean": pytest.approx(best_of_n_kl(4)), "stderr": 0.0, "n": PROMPTS}
    assert told["curves"] == []
    candidates = read_candidates(made[0])
    assert told["samples"][1]["responses"]["choosy"]["text"] == candidates.texts[candidates.chosen[2]]
    assert [point["n"] for point in told["selection"]] == curve_points(SAMPLES)
    rewards = [point["reward"]["mean"] for point in told["selection"]]
    assert rewards == sorted(rewards)
    assert rewards[-1] == pytest.approx(candidates.reward.amax(1).mean().item())
    assert "gold" not in told["selection"][0]  # there is no gold judge without topics


def test_a_reward_without_an_opinion_chooses_the_first(models, tmp_path):
    settings = PARAMS.best_of_n.model_copy(update={"missing_eos_score": 0.0, "samples": None})
    run(models, tmp_path / "out", typed_arm(method="best_of_n", reward="constant", n=3, seed=1), settings)
    found = read_candidates(tmp_path / "out")
    assert found.chosen == [0, 3, 6, 9]
