import pytest
import torch

from rrlhf.models.load import load_base
from rrlhf.models.rollout import Draws, response_features, rollout_metrics, sample, sample_in_batches, text_lengths
from rrlhf.models.states import hidden_states
from rrlhf.models.top import PolicyTop

PROMPTS = [[3, 9, 12], [4, 7, 8, 20, 21, 22, 23], [5, 30, 31, 32]]


@pytest.fixture(scope="module")
def settings(model):
    return model.model_copy(update={"response_tokens": 8})


@pytest.fixture(scope="module")
def language(settings):
    language = load_base(settings)
    with torch.no_grad():
        language.network.lm_head.weight.mul_(8)  # far from uniform, so that wrong log-probabilities show
        language.network.lm_head.weight[language.end].mul_(1.5)
    return language


def drawn(language, prompts=PROMPTS, seed=0, tokens=10, keep=(), temperature=1.0):
    return sample(language, prompts, tokens, Draws(torch.Generator().manual_seed(seed)), keep, temperature)


def test_log_probabilities_and_entropies_are_those_of_the_network_run_on_each_row_alone(language):
    for seed in range(3):
        samples = drawn(language, seed=seed)
        for row, prompt in enumerate(PROMPTS):
            response = samples.lists()[row]
            with torch.no_grad():
                logits = language.network(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            alone = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
            torch.testing.assert_close(samples.logprobs[row, : len(response)], alone, atol=1e-4, rtol=1e-4)
            spread = torch.distributions.Categorical(logits=logits).entropy()
            torch.testing.assert_close(samples.entropy[row, : len(response)], spread, atol=1e-4, rtol=1e-4)


def test_a_low_temperature_says_likelier_things_and_tells_their_likelihood_at_temperature_1(language):
    warm, cold = (drawn(language, PROMPTS * 20, temperature=temperature) for temperature in (1.0, 0.3))
    assert cold.logprobs.sum() / cold.mask.sum() > warm.logprobs.sum() / warm.mask.sum() + 0.1
    for row, prompt in enumerate(PROMPTS):
        response = cold.lists()[row]
        with torch.no_grad():
            logits = language.network(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        alone = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(cold.logprobs[row, : len(response)], alone, atol=1e-4, rtol=1e-4)


def test_rows_end_at_their_first_end_of_sequence_and_nothing_counts_behind_it(language):
    samples = drawn(language, PROMPTS * 20, tokens=30)
    eos = language.end
    assert samples.finished.any()
    for response, finished in zip(samples.lists(), samples.finished.tolist(), strict=True):
        assert eos not in response[:-1]
        assert (response[-1] == eos) == finished
        assert finished or len(response) == 30
    assert (samples.logprobs[~samples.mask] == 0).all()


def test_the_training_path_repeats_the_samplers_log_probabilities(language):
    """The ratio of the first minibatch is 1: what the optimiser sees is what was sampled."""
    samples = drawn(language, PROMPTS * 4, keep=(2,))
    with torch.no_grad():
        logprobs, _ = PolicyTop(language, 2)(samples.states[2], samples.prompt_lengths, samples.responses, samples.mask)
    ratio = ((logprobs - samples.logprobs) * samples.mask).exp()
    assert (ratio - 1).abs().max() < 1e-4


def test_features_from_the_sampling_pass_equal_those_of_a_pass_over_the_text(language):
    samples = drawn(language, PROMPTS * 4, keep=(1,))
    lengths = text_lengths(samples)
    sequences = [prompt + row for prompt, row in zip(PROMPTS * 4, samples.lists(), strict=True)]
    again = response_features(hidden_states(language, sequences, 1), samples.prompt_lengths, lengths)
    sampled = response_features(samples.states[1], samples.prompt_lengths, lengths)
    torch.testing.assert_close(sampled, again, atol=1e-5, rtol=1e-4)


def test_features_are_the_mean_over_the_response_and_ignore_padding():
    states = torch.arange(12.0).view(1, 6, 2)
    pooled = response_features(states, torch.tensor([2]), torch.tensor([3]))
    assert pooled.tolist() == [states[0, 2:5].mean(0).tolist()]
    longer = torch.cat([states, torch.full((1, 3, 2), 99.0)], dim=1)
    assert torch.equal(response_features(longer, torch.tensor([2]), torch.tensor([3])), pooled)
    empty = response_features(states, torch.tensor([2]), torch.tensor([0]))
    assert empty.tolist() == [states[0, 1].tolist()]


def test_samples_follow_the_networks_distribution(language):
    """First tokens of 4,000 rows against the softmax: total variation within what chance allows."""
    prompt = [3, 9, 12]
    first = drawn(language, [prompt] * 4000, tokens=1).responses[:, 0]
    with torch.no_grad():
        expected = language.network(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    frequency = torch.bincount(first, minlength=len(expected)) / 4000
    assert (frequency - expected).abs().sum() / 2 < 0.06


def test_the_same_seed_gives_the_same_responses_on_any_number_of_cores(language, settings):
    def responses(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return sample_in_batches(language, PROMPTS * 3, settings, batch_size=4, seed=5, label="test")
        finally:
            torch.set_num_threads(before)

    assert responses(1) == responses(2)
    assert len(responses(1)) == 9


def test_repetition_is_the_share_of_pairs_said_before_and_0_without_a_pair():
    def repetition(*rows):
        responses, mask = torch.tensor(rows), torch.tensor(rows) > 0
        nothing = torch.zeros(mask.shape)
        return rollout_metrics(nothing, mask, nothing, responses, mask.any(1))["repetition"]

    assert repetition([5, 6, 5, 6, 5], [5, 6, 7, 0, 0]) == pytest.approx(2 / 6)
    assert repetition([5, 0, 0], [5, 0, 0]) == 0
