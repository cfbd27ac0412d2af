import pytest
import torch
from accelerate import Accelerator

from rrlhf.config import Fit
from rrlhf.losses import bradley_terry, gaussian_bradley_terry
from rrlhf.rewards.heads import Pairs, RewardHeads, bootstrap_weights, fit


@pytest.fixture
def pairs():
    """Pairs whose winner follows one direction of the features, with a tenth of the labels flipped."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 600, 8, generator=generator)
    swap = ((one - other)[:, 0] < 0) ^ (torch.rand(600, generator=generator) < 0.1)
    return Pairs(torch.where(swap[:, None], other, one), torch.where(swap[:, None], one, other))


def trained(pairs, heads, weights, hidden=0):
    torch.manual_seed(0)
    model = RewardHeads(8, heads, hidden, 0.05)
    rows = fit(
        model,
        lambda chosen, rejected, _: bradley_terry(chosen.mean - rejected.mean),
        pairs,
        weights,
        Fit(epochs=100, pairs_per_batch=600, learning_rate=0.1, weight_decay=0.0),
        accelerator=Accelerator(cpu=True),
        generator=torch.Generator().manual_seed(0),
    )
    losses = [row["loss"] for row in rows]
    assert losses[-1] < losses[0]
    return model.eval()


def test_a_linear_head_finds_the_logistic_regression(pairs):
    """At the optimum of the Bradley-Terry loss the gradient with respect to the weights vanishes."""
    head = trained(pairs, 1, torch.ones(600, 1))
    margin = head(pairs.chosen).mean - head(pairs.rejected).mean
    x = (pairs.chosen - pairs.rejected) / head.feature_std
    assert ((1 - margin.sigmoid()) * x).mean(0).abs().max() < 0.01
    assert head.outer[0, :, 0].abs().argmax() == 0


@pytest.mark.parametrize("hidden", [0, 4])
def test_heads_trained_together_equal_heads_trained_alone(pairs, hidden):
    weights = bootstrap_weights(600, 3, torch.Generator().manual_seed(1))
    together = RewardHeads(8, 3, hidden, 0.05)
    loss = lambda chosen, rejected, _: gaussian_bradley_terry(chosen, rejected)  # noqa: E731

    def train(model, columns):
        rows = fit(
            model,
            loss,
            pairs,
            columns,
            Fit(epochs=3, pairs_per_batch=100, learning_rate=0.01, weight_decay=0.0),
            accelerator=Accelerator(cpu=True),
            generator=torch.Generator().manual_seed(0),
        )
        list(rows)
        return model

    alone = RewardHeads(8, 1, hidden, 0.05)
    with torch.no_grad():
        for name, parameter in alone.named_parameters():
            parameter.copy_(together.get_parameter(name)[1:2])
    train(together, weights)
    train(alone, weights[:, 1:2])
    torch.testing.assert_close(alone(pairs.chosen).mean[:, 0], together(pairs.chosen).mean[:, 1], atol=1e-4, rtol=1e-4)


def test_scores_have_mean_zero_and_standard_deviation_one_on_the_reference_set(pairs):
    heads = trained(pairs, 3, bootstrap_weights(600, 3, torch.Generator().manual_seed(1)))
    heads.normalise(pairs.chosen)
    scores = heads.score(pairs.chosen)
    torch.testing.assert_close(scores.mean.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.mean.std(0), torch.ones(3))


def test_what_was_saved_scores_alike_with_its_statistics(pairs, tmp_path):
    heads = trained(pairs, 2, torch.ones(600, 2), hidden=4)
    heads.normalise(pairs.chosen)
    heads.save(tmp_path)
    again = RewardHeads.load(tmp_path)
    assert torch.equal(again.score(pairs.rejected).mean, heads.score(pairs.rejected).mean)
    assert torch.equal(again.score(pairs.rejected).std, heads.score(pairs.rejected).std)


def test_a_constant_head_is_refused(pairs):
    heads = RewardHeads(8, 2, 0, 0.05)
    torch.nn.init.zeros_(heads.outer)
    with pytest.raises(ValueError, match=r"reward heads \[0, 1\] give every reference response the same"):
        heads.normalise(pairs.chosen)


def test_every_bootstrap_sample_has_as_many_draws_as_pairs():
    weights = bootstrap_weights(50, 4, torch.Generator().manual_seed(0))
    assert weights.sum(0).tolist() == [50.0] * 4
    assert not torch.equal(weights[:, 0], weights[:, 1])
