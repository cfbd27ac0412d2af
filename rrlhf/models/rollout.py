"""Sampling responses, and all that training must remember about them.

Prompts run end to end, without padding; then all rows grow by a token at a time. What is handed on is padded on the
right, where causal attention needs no mask.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from rrlhf.config import Model
from rrlhf.environment import give_back_memory
from rrlhf.kl import k3
from rrlhf.models.layers import ages, groups, grow, prefill
from rrlhf.models.load import LanguageModel
from rrlhf.models.processes import autocast
from rrlhf.models.shards import most
from rrlhf.progress import track
from rrlhf.returns import masked_mean
from rrlhf.stopping import check_stop
from rrlhf.types import Metrics

LIKELIEST = 1e-6  # a temperature so low that only the most likely token is drawn


class Samples(NamedTuple):
    """Sampled responses. `mask` is True where a token counts; a response's end-of-sequence token counts."""

    prompt_lengths: Tensor  # [batch] tokens
    responses: Tensor  # [batch, response tokens]; padding behind the end
    mask: Tensor  # [batch, response tokens] bool
    logprobs: Tensor  # [batch, response tokens] of the sampled tokens, under the sampling policy at temperature 1
    entropy: Tensor  # [batch, response tokens] of the sampling distribution, nats
    finished: Tensor  # [batch] bool: ended by itself within the limit
    states: dict[int, Tensor]  # by layer: hidden states [batch, prompt + response tokens, width], padded on the right
    top: Tensor | None  # [batch, response tokens, width] normalised last states that predicted each; None: unknown

    def lists(self) -> list[list[int]]:
        """Return each response's tokens as a list, its end-of-sequence token included."""
        return [row[keep].tolist() for row, keep in zip(self.responses, self.mask, strict=True)]


class Draws(NamedTuple):
    """Uniform numbers, one a row at every step, of which several processes take their share: as many make the same."""

    generator: torch.Generator  # at the same place in all processes
    processes: int = 1
    rank: int = 0
    group: int = 1  # neighbouring rows that one process has

    def __call__(self, rows: int) -> Tensor:
        """Return the numbers of this process's rows, [rows]."""
        everyone = torch.rand(rows * self.processes, generator=self.generator, device=self.generator.device)
        return everyone.view(-1, self.processes, self.group)[:, self.rank].flatten()


class Response(NamedTuple):
    """One sampled response."""

    tokens: list[int]  # its end-of-sequence token included
    finished: bool
    logprob: float  # of the whole response under the sampling policy at temperature 1, nats


class Rollout(NamedTuple):
    """One batch of responses and all that PPO must remember about them."""

    entering: Tensor  # [batch, tokens, width] below the trained layers, or tokens [batch, tokens]; padded on the right
    prompt_lengths: Tensor  # [batch] tokens
    responses: Tensor  # [batch, response tokens]
    mask: Tensor  # [batch, response tokens] bool
    logprobs: Tensor  # [batch, response tokens] of the sampling policy
    reference_logprobs: Tensor  # [batch, response tokens]
    values: Tensor  # [batch, response tokens]; 0 without a value function
    advantages: Tensor  # [batch, response tokens]
    returns: Tensor  # [batch, response tokens]

    def rows(self, index: Tensor) -> Rollout:
        """Return the rows of `index`, without the padding that none of them needs."""
        some = Rollout(*(field[index] for field in self))
        steps = some.mask.sum(1)
        longest, most = int((some.prompt_lengths + steps).max()), int(steps.max())
        responses = (field[:, :most] for field in some[2:])
        return Rollout(some.entering[:, :longest], some.prompt_lengths, *responses)

    def packed(self, tokens: int) -> list[Tensor]:
        """Split the rows into groups of similar length, each of at most so many tokens with its padding."""
        return groups(self.prompt_lengths + self.mask.sum(1), tokens)


def rollout_metrics(log_ratio: Tensor, mask: Tensor, entropy: Tensor, responses: Tensor, finished: Tensor) -> Metrics:
    """Return a rollout's KL to the reference in nats per response (k1 and k3), entropy per token, and lengths.

    log_ratio: of the policy to the reference; it and what follows are [batch, response tokens], finished [batch].
    """
    return {
        "kl": log_ratio.sum(1).mean().item(),
        "kl_k3": (k3(log_ratio) * mask).sum().item() / len(mask),
        "entropy": masked_mean(entropy, mask).item(),
        "repetition": _repetition(responses, mask),
        "response_tokens": mask.sum(1).float().mean().item(),
        "finished": finished.float().mean().item(),
    }


def _repetition(responses: Tensor, mask: Tensor) -> float:
    """Return the share of a batch's pairs of neighbouring tokens that occurred before in the same response."""
    row = torch.arange(len(responses), device=responses.device)[:, None].expand_as(responses)[:, 1:]
    pairs = torch.stack([row, responses[:, :-1], responses[:, 1:]], dim=-1)[mask[:, 1:]]
    return (len(pairs) - len(pairs.unique(dim=0))) / max(len(pairs), 1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return which share of the returns' variance the value function foresaw, of [batch, tokens] each; 1 is all."""
    unexplained = masked_mean((returns - values) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - (unexplained / variance.clamp(min=1e-8)).item()


@torch.no_grad()
def sample(
    language: LanguageModel,
    prompts: list[list[int]],
    response_tokens: int,
    draws: Draws,
    keep: tuple[int, ...] = (),
    temperature: float = 1.0,
) -> Samples:
    """Sample a response to each prompt, and keep the hidden states that enter the layers `keep`.

    Rows that ended leave the batch once a quarter of it has; nothing of a row depends on the others but the draw.
    Log-probabilities are those of the model itself, at temperature 1, at whatever temperature it is sampled.
    """
    from transformers import DynamicCache

    if not language.by_layers:
        return _generated(language, prompts, response_tokens, draws, temperature)
    network, device = language.network, language.device
    ends = torch.tensor(language.ends, device=device)
    batch, width = len(prompts), max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    responses = torch.full((batch, response_tokens), language.end, device=device)
    mask = torch.zeros_like(responses, dtype=torch.bool)
    logprobs = torch.zeros(batch, response_tokens, device=device)
    entropy = torch.zeros_like(logprobs)
    top = torch.zeros(batch, response_tokens, language.width, device=device)

    cache = DynamicCache()
    packing, entered, below = prefill(network, prompts, language.layers, cache, keep)
    hidden = entered[0, packing.flat(torch.arange(batch, device=device), lengths - 1)]
    room = (0, 0, 0, response_tokens)
    states = {layer: pad(packing.grid(entering.float()), room) for layer, entering in below.items()}
    rows = torch.arange(batch, device=device)  # the rows still growing
    running = torch.ones(batch, dtype=torch.bool, device=device)
    age = ages(lengths, width, response_tokens)  # of the cache's columns: prompts, their padding, responses
    for step in range(response_tokens):
        state = network.model.norm(hidden)
        uniform = draws(batch)[rows]
        token, logprob, spread = draw(network.lm_head(state).float(), uniform, temperature)
        counts = running[rows]
        responses[rows, step] = torch.where(counts, token, language.end)
        mask[rows, step] = counts
        logprobs[rows, step] = torch.where(counts, logprob, 0.0)
        entropy[rows, step] = torch.where(counts, spread, 0.0)
        top[rows, step] = state.float()
        running[rows] &= ~torch.isin(token, ends)
        if not most(int(running.any()), device) or (step == response_tokens - 1 and not keep):
            break
        alive = running[rows]
        if 0 < alive.float().mean() <= 0.75:  # where none is, others go on, and all take as many steps
            cache.batch_select_indices(alive.nonzero()[:, 0])
            rows = rows[alive]
        # The last tokens enter too: reward features look at them.
        ago = age[rows, : width + step + 1] + step
        hidden, below = grow(network, responses[rows, step], lengths[rows] + step, ago, cache, keep)
        for layer, entering in below.items():
            states[layer][rows, lengths[rows] + step] = entering.float()
    return Samples(lengths, responses, mask, logprobs, entropy, ~running, states, top)


def most_likely(language: LanguageModel, prompt: list[int], response_tokens: int) -> list[int]:
    """Return the tokens of the response that takes the most likely token at every step, its end included."""
    draws = Draws(torch.Generator(language.device))
    [said] = sample(language, [prompt], response_tokens, draws, temperature=LIKELIEST).lists()
    return said


def _generated(
    language: LanguageModel,
    prompts: list[list[int]],
    response_tokens: int,
    draws: Draws,
    temperature: float,
) -> Samples:
    """Sample by the model's own `generate`, whose cache, positions and masks are those of its make.

    It takes the likeliest token, and only the drawn one is likely. Rows are padded on the left, and stay to the end.
    """
    from transformers import GenerationConfig

    network, device = language.network, language.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    inside = torch.arange(width, device=device) >= width - lengths[:, None]
    asked = torch.full_like(inside, language.end, dtype=torch.long)
    asked[inside] = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def drawn(_: Tensor, logits: Tensor) -> Tensor:
        uniform = draws(len(prompts))
        found.append(draw(logits.float(), uniform, temperature))
        return torch.full_like(logits, -torch.inf).scatter(1, found[-1][0][:, None], 0.0)

    network.generate(
        asked,
        attention_mask=inside.long(),
        logits_processor=[drawn],
        generation_config=GenerationConfig(
            max_new_tokens=response_tokens, do_sample=False, eos_token_id=language.ends, pad_token_id=language.end
        ),
    )
    for _ in range(most(len(found), device) - len(found)):  # so often did others draw after these had ended
        draws(len(prompts))
    short = (0, response_tokens - len(found))  # as wide in all processes, which lay what they have side by side
    responses, logprobs, entropy = (pad(torch.stack(each, dim=1), short) for each in zip(*found, strict=True))
    ended = torch.isin(responses, torch.tensor(language.ends, device=device))
    mask = ended.cumsum(1) - ended.long() == 0
    return Samples(
        prompt_lengths=lengths,
        responses=responses.masked_fill(~mask, language.end),
        mask=mask,
        logprobs=logprobs * mask,
        entropy=entropy * mask,
        finished=ended.any(1),
        states={},
        top=None,
    )


def draw(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return one index per row with its log-probability at temperature 1 and the entropy in nats of what is drawn from.

    Inverts the cumulative distribution at `uniform` [rows]: several times faster than torch.multinomial on a large
    vocabulary, and a row's draw does not depend on the others. With Z the softmax's denominator, log p = logit - log Z,
    so one index gives log Z, and the entropy is log Z - sum of p logit: a single exponential of the vocabulary.
    """
    cold = logits / temperature if temperature != 1 else logits
    probabilities = cold.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=1)
    target = uniform[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[1] - 1)
    logprob = probabilities.gather(1, drawn)[:, 0].log()
    log_z = cold.gather(1, drawn)[:, 0] - logprob
    entropy = (log_z - torch.linalg.vecdot(probabilities, cold)).clamp(min=0.0)
    if temperature != 1:
        logprob = -cross_entropy(logits, drawn[:, 0], reduction="none")
    return drawn[:, 0], logprob, entropy


def response_features(states: Tensor, prompt_lengths: Tensor, text_lengths: Tensor) -> Tensor:
    """Return the mean state over each response's text, [batch, width] float32: what reward heads see.

    text_lengths: tokens before the end of sequence; an empty text is represented by the prompt's last token.
    """
    at = torch.arange(states.shape[1], device=states.device)
    first = torch.where(text_lengths > 0, prompt_lengths, prompt_lengths - 1)
    inside = (at >= first[:, None]) & (at < (first + text_lengths.clamp(min=1))[:, None])
    return (states.float() * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)


def tokens_of(prompts: list[list[int]], samples: Samples) -> Tensor:
    """Return prompts with their responses as one tensor of tokens [batch, tokens], padded on the right."""
    rows = [torch.tensor(prompt + row) for prompt, row in zip(prompts, samples.lists(), strict=True)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(samples.mask.device)


def text_lengths(samples: Samples) -> Tensor:
    """Return how many tokens of each response are text, its end excluded, [batch]."""
    return samples.mask.sum(1) - samples.finished.long()


def sample_in_batches(
    language: LanguageModel,
    prompts: list[list[int]],
    model: Model,
    *,
    batch_size: int,
    seed: int,
    label: str,
    temperature: float = 1.0,
) -> list[Response]:
    """Sample a response to every prompt, prompts of similar length together.

    On a CPU the matrices of one decoding step are too small to share, so each core samples batches of its own; every
    batch has its own generator, and the number of cores changes nothing.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def draw(number: int) -> Samples:
        generator = torch.Generator(language.device).manual_seed(seed * 100_003 + number)
        with autocast(model):
            asked = [prompts[i] for i in batches[number]]
            return sample(language, asked, model.response_tokens, Draws(generator), temperature=temperature)

    workers = torch.get_num_threads() if language.device.type == "cpu" else 1
    responses: dict[int, Response] = {}
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch, drawn in zip(batches, track(pool.map(draw, range(len(batches))), len(batches), label), strict=True):
            rows = zip(drawn.lists(), drawn.finished.tolist(), drawn.logprobs.sum(1).tolist(), strict=True)
            responses |= {i: Response(*row) for i, row in zip(batch, rows, strict=True)}
            check_stop()
    give_back_memory()
    return [responses[i] for i in range(len(prompts))]
