import math
from pathlib import Path

import pytest
import torch

from rrlhf.losses import bradley_terry, gaussian_bradley_terry
from rrlhf.pipeline.params import load_params
from rrlhf.rewards.objectives import preference_loss, single_loss
from rrlhf.robust import Scores

ROOT = Path(__file__).parents[2]
INDEX = torch.arange(6)


@pytest.fixture
def scores():
    mean, std = torch.randn(2, 6, 3, dtype=torch.float64), torch.rand(2, 6, 3, dtype=torch.float64) + 0.1
    return Scores(mean[0], std[0]), Scores(mean[1], std[1])


def settings(**changes):
    return load_params(ROOT).ensemble.model_copy(update=changes)


def test_the_default_settings_are_the_plain_losses(scores):
    chosen, rejected = scores
    gaussian, plain = gaussian_bradley_terry(chosen, rejected), bradley_terry(chosen.mean - rejected.mean)
    torch.testing.assert_close(preference_loss(settings())(*scores, INDEX), gaussian, rtol=0, atol=1e-12)
    torch.testing.assert_close(single_loss(settings())(*scores, INDEX), plain, rtol=0, atol=1e-12)


def test_all_settings_together_equal_the_loop(scores):
    chosen, rejected = scores
    together = settings(margin=0.3, centring=0.1, label_smoothing=0.2, dro_temperature=0.7, dro_cap=1.5)
    found = preference_loss(together)(chosen, rejected, INDEX)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    for head in range(3):
        losses = []
        for row in range(6):
            difference = (chosen.mean - rejected.mean)[row, head].item()
            variance = (chosen.std**2 + rejected.std**2)[row, head].item()
            scale = math.sqrt(1 + math.pi / 8 * variance)
            kept, flipped = sigmoid((difference - 0.3) / scale), sigmoid((-difference - 0.3) / scale)
            losses.append(-0.8 * math.log(kept) - 0.2 * math.log(flipped))
        raw = [math.exp(loss / 0.7) for loss in losses]
        for row in range(6):
            weight = min(raw[row] * 6 / sum(raw), 1.5)
            centre = (chosen.mean + rejected.mean)[row, head].item() ** 2
            assert found[row, head].item() == pytest.approx(losses[row] * weight + 0.1 * centre, abs=1e-9)
