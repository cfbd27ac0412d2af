"""Stage 2: supervised fine-tuning, the policy that PPO starts from and is held close to."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.func import functional_call

from rrlhf.config import Model, Sft
from rrlhf.data.tables import demonstrations
from rrlhf.models.load import LanguageModel, load_base, save_model
from rrlhf.models.processes import accelerator, microbatches
from rrlhf.models.shards import loading_device, reads_weights
from rrlhf.models.text import Texts
from rrlhf.models.whole import final_norm
from rrlhf.policy.answers import Answers, answer
from rrlhf.policy.checkpoint import Checkpoints
from rrlhf.policy.learner import top_layers, with_optimizer
from rrlhf.policy.supervision import resumable, shuffled
from rrlhf.progress import track
from rrlhf.types import Log, Metrics


def run(*, seed: int, model: Model, sft: Sft, data: Path, out: Path, log: Log) -> None:
    """Fine-tune the base model on the demonstrations and save it; goes on from a checkpoint in `out`."""
    engine = accelerator(model)
    language = load_base(model, weights=reads_weights(engine))
    texts = Texts(language, model)
    rows = [answer(texts, *demonstration) for demonstration in demonstrations(data)]
    log({"step": 0, **texts.told("sft")})
    batches = shuffled(len(rows), sft.batch_size, sft.epochs, seed)
    top = top_layers(language, loading_device(engine), sft.train_layers)
    trained = with_optimizer(engine, language, top, sft.learning_rate, len(batches))
    answers = Answers(trained, rows, model, keep_states=sft.keep_states)
    if top.first is not None and sft.keep_states:
        answers.read_below(sft.microbatch_size, "sft: frozen layers")
    checkpoints = Checkpoints(out, engine, seed=seed, model=model, sft=sft)
    steps = resumable(partial(train, answers, batches, sft), trained, checkpoints, "sft")
    for row in track(steps, len(batches), "sft"):
        log(row)
    sharpen(language, sft.temperature)
    save_model(language, out)
    engine.wait_for_everyone()


def sharpen(language: LanguageModel, temperature: float) -> None:
    """Have the model say at temperature 1 what it says at this one, in place: its last norm scales all logits.

    At temperature 1 a small model says something odd in every other sentence, and every stage that follows samples so.
    Before training this would not last: the likelihood of demonstrations asks for their own temperature.
    Raises ValueError when the model has no last norm that scales.
    """
    network, norm = language.network, final_norm(language.network)
    if temperature == 1:
        return
    if norm is None:
        raise ValueError(f"sft.temperature {temperature}: the model's last norm has no weights to scale; set it to 1.0")
    with torch.no_grad():
        unit = _unit(norm, language.width)
        for name, weight in norm.named_parameters():
            own = unit if name == "weight" else 0.0
            weight.copy_((weight + own) / temperature - own)
        bias = getattr(network.get_output_embeddings(), "bias", None)
        if bias is not None:
            bias /= temperature
    config = network.config.get_text_config()
    if getattr(config, "final_logit_softcapping", None):
        config.final_logit_softcapping /= temperature  # c/T tanh((z/T) / (c/T)) = (c tanh(z/c)) / T


def _unit(norm: nn.Module, width: int) -> float:
    """Return 1 where a norm multiplies by 1 + its weight, as Gemma's do, else 0."""
    zeros = {name: torch.zeros(each.shape).to(each.device, each.dtype) for name, each in norm.named_parameters()}
    weight = next(norm.parameters())
    states = torch.arange(float(width), device=weight.device, dtype=weight.dtype)[None]
    return float(functional_call(norm, zeros, states).any())


def train(answers: Answers, batches: list[list[int]], sft: Sft, first: int = 0) -> Iterator[Metrics]:
    """Minimise the token-mean loss on completions, from batch `first` on; yield metrics after every optimizer step.

    Every process takes its share of each batch, and the gradient is the mean over all tokens of the batch, so the
    number of processes changes nothing but rounding.
    """
    trained, engine = answers.trained, answers.trained.engine
    for step, batch in enumerate(batches[first:], first + 1):
        counted = answers.response_tokens(batch)
        total = torch.zeros((), device=engine.device)
        for (part, counts), synchronised in microbatches(engine, trained.policy, batch, sft.microbatch_size):
            with synchronised:
                loss = -answers.logprobs(trained.policy, part).sum() * counts / counted
                engine.backward(loss * engine.num_processes)  # data parallelism averages over processes
            total += loss.detach()
        norm = trained.step(sft.max_grad_norm)
        mean = engine.reduce(total, reduction="sum").item()
        yield {"step": step, "loss": mean, "gradient_norm": norm, "tokens": counted}
