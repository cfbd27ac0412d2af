"""Stage 2: supervised fine-tuning, the policy that PPO starts from and is held close to.

Where only the top layers train, what the frozen layers below leave of a demonstration is the same in every epoch.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rrlhf.config import Model, Sft
from rrlhf.data.tables import demonstrations
from rrlhf.models.layers import hidden_states
from rrlhf.models.load import LanguageModel, accelerator, autocast, load_base, microbatches, save_model
from rrlhf.models.text import Texts
from rrlhf.models.top import PolicyTop, first_trained, split_responses
from rrlhf.policy.checkpoint import Trained
from rrlhf.policy.steps import shuffled, take_steps
from rrlhf.progress import track
from rrlhf.types import Demonstration, Log, Metrics


class Example(NamedTuple):
    """Tokens of a prompt with its response; the loss counts the response only."""

    tokens: list[int]
    prompt_length: int
    states: Tensor | None = None  # [tokens, width] that enter the layers that train, on the CPU; None: all do


def run(*, seed: int, model: Model, sft: Sft, data: Path, out: Path, log: Log) -> None:
    """Fine-tune the base model on the demonstrations and save it."""
    engine = accelerator(model)
    language = load_base(model)
    texts = Texts(language, model)
    examples = [_example(texts, demonstration) for demonstration in demonstrations(data)]
    log({"step": 0, **texts.told("sft")})
    train(engine, language, examples, model, sft, seed, out, log)
    sharpen(language, sft.temperature)
    if engine.is_main_process:
        save_model(language, out)
    engine.wait_for_everyone()


def sharpen(language: LanguageModel, temperature: float) -> None:
    """Have the model say at temperature 1 what it says at this one, in place: its last norm scales all logits.

    At temperature 1 a small model says something odd in every other sentence, and every stage that follows samples so.
    Before training this would not last: the likelihood of demonstrations asks for their own temperature.
    """
    with torch.no_grad():
        language.network.model.norm.weight /= temperature


def train(
    engine: Accelerator,
    language: LanguageModel,
    examples: list[Example],
    model: Model,
    sft: Sft,
    seed: int,
    out: Path,
    log: Log,
) -> None:
    """Minimise the token-mean loss on completions; log metrics after every optimizer step.

    Goes on from the checkpoint in `out`, if there is one.

    Every process takes its share of each batch, and the gradient is the mean over all tokens of the batch, so the
    number of processes changes nothing but rounding.
    """
    batches = shuffled(len(examples), sft.batch_size, sft.epochs, seed)
    first = None
    if sft.train_layers is not None:
        first = first_trained(language, sft.train_layers, "sft.train_layers")
        language.network.requires_grad_(False).to(engine.device)
    top = PolicyTop(language, first)
    top.value.requires_grad_(False)  # PPO's
    if first is not None:
        for part in (top.layers, top.norm):
            part.requires_grad_(True)
        examples = _read_below(language, examples, first, model, sft.microbatch_size)
    weights = [parameter for parameter in top.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=sft.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    policy, optimizer = engine.prepare(top, optimizer)

    def step(number: int) -> Metrics:
        batch = [examples[i] for i in batches[number]]
        mine = batch[engine.process_index :: engine.num_processes]
        counted = sum(len(example.tokens) - example.prompt_length for example in batch)
        total = torch.zeros((), device=engine.device)
        for part, synchronised in microbatches(engine, policy, mine or batch[:1], sft.microbatch_size):
            with synchronised:
                with autocast(model):
                    loss = _summed_loss(policy, part, engine.device) * bool(mine) / counted
                engine.backward(loss * engine.num_processes)  # data parallelism averages over processes
            total += loss.detach()
        norm = engine.clip_grad_norm_(policy.parameters(), sft.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        mean = engine.reduce(total, reduction="sum").item()
        return {"step": number + 1, "loss": mean, "gradient_norm": float(norm), "tokens": counted}

    made_for = {"seed": seed, "model": model.model_dump(), "sft": sft.model_dump()}
    trained = Trained(top, optimizer, schedule)
    take_steps(engine, trained, step, len(batches), label="sft", log=log, out=out, made_for=made_for)


def _example(texts: Texts, demonstration: Demonstration) -> Example:
    """Return a demonstration as tokens; one that is cut teaches no end, for that would be in mid-sentence."""
    asked = texts.prompt(demonstration.prompt)
    return Example([*asked, *texts.answer(demonstration.response)], len(asked))


@torch.no_grad()
def _read_below(
    language: LanguageModel, examples: list[Example], first: int, model: Model, batch_size: int
) -> list[Example]:
    """Run the frozen layers on the examples, once for all epochs, and keep what they leave."""
    found: list[Example] = []
    for start in track(range(0, len(examples), batch_size), -(-len(examples) // batch_size), "sft: frozen layers"):
        part = examples[start : start + batch_size]
        with autocast(model):
            grid = hidden_states(language.network, [example.tokens for example in part], first)
        for example, row in zip(part, grid.cpu(), strict=True):
            found.append(example._replace(states=row[: len(example.tokens)].clone()))
    return found


def _summed_loss(policy: nn.Module, examples: list[Example], device: torch.device) -> Tensor:
    """Return the sum of the completions' token losses; rows are padded on the right, behind all that counts."""
    rows, prompt_lengths, states = zip(*examples, strict=True)
    entering = [torch.tensor(row) if state is None else state for row, state in zip(rows, states, strict=True)]
    padded = pad_sequence(entering, batch_first=True).to(device)
    logprobs, _ = policy(padded, *split_responses(rows, prompt_lengths, device))
    loss: Tensor = -logprobs.sum()
    return loss
