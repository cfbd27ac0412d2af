"""How much memory each stage takes, before anything runs: one process, every text as long as the settings allow.

The models are there as shapes only, and run as the stages run them (rrlhf/models/memory.py). Where weights are spread
over processes, one has its share of them, of gradients and of the optimizer's state. Not counted: Python and
its libraries (about half a gigabyte), tables of the data, and what an allocator keeps of memory that is free.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rrlhf.config import Ensemble, Launch, LoraEnsemble, MemberEnsemble, Model, Params
from rrlhf.hardware import cores, device_kind, dtype_name
from rrlhf.located import ParamsError
from rrlhf.models.adapters import adapted
from rrlhf.models.load import LanguageModel, load_shape
from rrlhf.models.memory import (
    FEW,
    Gathered,
    Pass,
    Rows,
    gathered,
    make_runnable,
    reading,
    sampling,
    size,
    states,
    through_all,
    training,
)
from rrlhf.models.processes import autocast, trained_weights
from rrlhf.models.text import Texts
from rrlhf.models.top import PolicyTop, split_responses
from rrlhf.models.whole import decoder_layers
from rrlhf.policy.learner import below, top_layers, trainable
from rrlhf.rewards.finetune import TrunkTop, let_train
from rrlhf.rewards.heads import RewardHeads
from rrlhf.rewards.trunk import Encoded, Trunk

META = torch.device("meta")


class Moment(NamedTuple):
    """What is in memory at one time of a stage, bytes."""

    when: str
    weights: int
    gradients: int = 0
    optimizer: int = 0
    reference: int = 0
    rollout: int = 0  # responses and what is kept of them; while sampling, keys and values
    activations: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self[1:])


class Trained(NamedTuple):
    """A language model with what trains of it, ready to run without numbers."""

    language: LanguageModel
    top: Any  # a PolicyTop or a TrunkTop
    model: Model
    weights: int  # bytes of them that this process has
    trained: int  # bytes of what trains of them, float32
    copied: int = 1  # how often the gradients are there
    gathered: Gathered = Gathered(0, 0)

    @property
    def base(self) -> dict[str, int]:
        """The parts of a moment that are there all the time."""
        return {"weights": self.weights + self.gathered.weights, "optimizer": 2 * self.trained}  # Adam's moments

    def step(self, layers: int, loss: Callable[[int], Tensor], parts: int) -> dict[str, int]:
        """Return the gradients and the activations of a step of so many microbatches.

        loss: of a pass through some of the layers that train.
        """

        def forward(depth: int) -> Tensor:
            with autocast(_on_processor(self.model)):
                return loss(depth)

        def taken(depth: int) -> int:
            return training([self.language.network, self.top], lambda: forward(depth))

        found = through_all(layers, taken) if self.language.by_layers else Pass(taken(layers), 0)
        gradients, beside = self.trained * self.copied, self.gathered.gradients
        if parts > 1:
            return {"gradients": gradients + beside, "activations": found.peak}
        # In the first pass gradients come as activations go: the most is at its beginning or at its end.
        peak = max(found.peak, gradients + 2 * found.layer)
        return {"gradients": gradients + beside, "activations": peak - gradients}

    def read(self, read: Callable[[], object]) -> int:
        """Return the bytes that a pass without gradients takes."""
        with autocast(_on_processor(self.model)):
            return reading([self.language.network, self.top], read)


def moments(stage: str, params: Params) -> list[Moment]:
    """Return the moments at which a stage may need the most; none of a stage that is not looked at."""
    ensemble, processes = params.ensemble, params.launch.processes
    trains_trunk = isinstance(ensemble, LoraEnsemble) or not ensemble.freeze_backbone
    match stage:
        case "sft":
            sft = params.sft
            trained = _top_layers(params, sft.train_layers)
            return [_supervised(trained, sft.microbatch_size, sft.batch_size // processes)]
        case "dpo":
            dpo = params.dpo
            trained = _top_layers(params, dpo.train_layers)
            return [_supervised(trained, 2 * dpo.microbatch_size, 2 * dpo.pairs_per_batch // processes)]
        case "reward" | "member":
            return [*_trunk(params)]
        case "ensemble" if trains_trunk:
            return [*_trunk(params, ensemble)]
        case "ppo":
            return [*_ppo(params)]
        case "evaluate":
            return [*_evaluate(params)]
    return []


def _supervised(trained: Trained, at_once: int, per_step: int) -> Moment:
    """Return the moment of a training on given responses, at_once of per_step at a time."""
    rows = _rows(trained.model, min(at_once, per_step))
    entered = _entered(trained.top, rows, trained.language.network.dtype)
    every, place = trained.top.layers, _place(rows)

    def loss(depth: int) -> Tensor:
        trained.top.layers = every[:depth]
        logprobs: Tensor = trained.top(entered, *place)[0]
        return logprobs.sum()

    return Moment("training", **trained.base, **trained.step(len(every), loss, math.ceil(per_step / rows.batch)))


def _ppo(params: Params) -> Iterator[Moment]:
    model, ppo, processes = _as_run(params.model), params.ppo, params.launch.processes
    language, top, _ = trainable(load_shape(model), ppo)
    shares = _shares(params.launch)
    copied = (weight for weight in top.parameters() if weight.requires_grad or shares > 1)
    reference = 0 if ppo.trains == "lora" else size(copied) // shares
    is_mapped = shares == 1 and device_kind(model.device) == "cpu" and language.dtype == language.network.dtype
    trained = _ready(language, top, model, params.launch)
    base = trained.base
    base["weights"] += _reward_trunks(params)
    rows = _rows(model, ppo.responses_per_update // processes)
    layer = params.reward.layer if params.reward.base is None and params.reward.trunk == "frozen" else None
    is_shared = layer is not None and top.first is not None and layer <= top.first
    keep = {each for each in (top.first, layer if is_shared else None) if each is not None}

    with autocast(_on_processor(model)):
        found = sampling(language, rows, len(keep))
    numbers = 4 * rows.batch * (rows.prompt + rows.response)  # one for each token
    state = numbers * language.width
    last = 4 * rows.batch * rows.response * language.width if language.by_layers else 0
    kept = state * len(keep) + last + 10 * numbers  # states, tokens, log-probabilities and what is made of them
    yield Moment("sampling, prompts", **base, rollout=kept, activations=found.first)
    yield Moment("sampling, responses", **base, rollout=kept + found.cache, activations=found.last)

    minibatch = ppo.minibatch_size // processes
    part = rows._replace(batch=max(min(minibatch, ppo.microbatch_tokens // (rows.prompt + rows.response)), 1))
    entered, seen = _entered(top, part, torch.float32), None if is_shared else layer
    every, place = top.layers, _place(part)
    top.layers = every[:FEW]
    read = trained.read(lambda: top.read(entered, *place, layer=None if seen is None else top.first or 1))
    seen_state = 0 if seen is None else state
    yield Moment("reading", **base, reference=reference, rollout=kept + seen_state, activations=read)

    kept = 10 * numbers + (state if top.first is not None and keep else 0)

    def loss(depth: int) -> Tensor:
        top.layers = every[:depth]
        read = top.read(entered, *place)
        return (read.logprobs + read.values).sum()

    step = trained.step(len(every), loss, math.ceil(minibatch / part.batch))
    kept += kept * minibatch // rows.batch  # the rows of a step, apart from those of the others
    yield Moment("training", **base, **step, reference=0 if is_mapped else reference, rollout=kept)


def _trunk(params: Params, ensemble: Ensemble | None = None) -> Iterator[Moment]:
    """Yield the moments of a reward model, or of an ensemble that trains a trunk."""
    settings = params.reward
    own = settings.language_model(_as_run(params.model))
    language = load_shape(own)
    trunk = Trunk(language, settings.layer, _on_processor(own), Texts(language, own))
    heads = ensemble.heads if ensemble else 1
    with META:
        top_heads = RewardHeads(trunk.language.width, heads, 0, 1.0)
    rows = _rows(own, settings.batch_size)
    layers = range(settings.layer - settings.train_layers, settings.layer)
    trains = settings.trunk != "frozen" or isinstance(ensemble, LoraEnsemble)
    if isinstance(ensemble, LoraEnsemble):
        trunk = trunk._replace(language=adapted(language, layers, settings.lora_rank, heads))
    elif trains:
        trunk = trunk._replace(language=let_train(trunk, settings))
    top = TrunkTop(trunk, top_heads, layers.start)
    trained = _ready(trunk.language, top, own)
    encoded = [Encoded(tokens, rows.prompt) for tokens in rows.tokens]
    read = trained.read(lambda: trunk.features(encoded, rows.batch))
    yield Moment("features", trained.base["weights"], activations=read)
    if not trains:
        return
    some = rows._replace(batch=2 * max(settings.batch_size // 2, 1))
    entered = states(some, language.width) if language.by_layers else torch.tensor(some.tokens)
    lengths = torch.full((some.batch,), some.prompt), torch.full((some.batch,), some.response)

    def loss(depth: int) -> Tensor:
        top.trunk = trunk._replace(layer=layers.start + depth)
        return top.forward(entered, *lengths).mean.sum()

    parts = math.ceil(2 * settings.trunk_pairs_per_batch / some.batch)
    yield Moment("training", **trained.base, **trained.step(len(layers), loss, parts))


def _evaluate(params: Params) -> Iterator[Moment]:
    model = _as_run(params.model)
    language = load_shape(model)
    first = params.reward.layer if params.reward.base is None else language.layers
    top = PolicyTop(language, first)
    trained = _ready(language, top, model)
    rows, weights = _rows(model, params.evaluate.batch_size), _weights(language.network)
    on_processor = device_kind(model.device) == "cpu"
    workers = (params.launch.threads or cores()) if on_processor else 1
    with autocast(_on_processor(model)):
        found = sampling(language, rows, 0)
    yield Moment("sampling, prompts", weights, activations=workers * found.first)
    yield Moment("sampling, responses", weights, rollout=workers * found.cache, activations=workers * found.last)
    judges = weights * (2 if params.prepare.source == "written" else 1) + _reward_trunks(params)
    entered, place = _entered(top, rows, language.network.dtype), _place(rows)
    top.layers = top.layers[:FEW]
    yield Moment("reading", judges, activations=trained.read(lambda: top.read(entered, *place, layer=first)))


def _top_layers(params: Params, train_layers: int | None) -> Trained:
    model = _as_run(params.model)
    language = load_shape(model)
    return _ready(language, top_layers(language, META, train_layers), model, params.launch)


def _shares(launch: Launch) -> int:
    """Return over how many processes weights are spread."""
    return launch.processes if launch.sharding == "full" else 1


def _ready(language: LanguageModel, top: nn.Module, model: Model, launch: Launch | None = None) -> Trained:
    """Make a model ready to run without numbers; launch: of the processes that train it."""
    if language.network.config._experts_implementation == "grouped_mm":
        raise ParamsError(f"model.base {model.base}: what a model with experts takes of memory cannot be planned")
    trained = size(trained_weights(top))
    weights, shares = _weights(language.network, top), _shares(launch) if launch else 1
    make_runnable(language.network, top)
    if isinstance(top, PolicyTop) and shares > 1:
        apart = below(language, top)
        weights = _weights(top) + _weights(*apart)  # what both have is spread twice
        around = gathered(top, apart)
        return Trained(language, top, model, weights // shares, trained // shares, gathered=around)
    copied = 2 if launch and launch.processes > 1 else 1  # data parallelism sends copies of gradients
    return Trained(language, top, model, weights, trained, copied)


def _reward_trunks(params: Params) -> int:
    """Return the bytes of the trunks that are loaded for the single head and for the ensemble."""
    reward, ensemble = params.reward, params.ensemble
    is_own = reward.base is not None or reward.trunk != "frozen"
    several = int(is_own)
    if isinstance(ensemble, LoraEnsemble) or not ensemble.freeze_backbone:
        several = 1
    elif isinstance(ensemble, MemberEnsemble) and reward.trunk != "frozen":
        several = ensemble.heads
    if not is_own + several:
        return 0
    network = load_shape(reward.language_model(_as_run(params.model))).network
    used = _weights(network.get_input_embeddings(), *decoder_layers(network)[: reward.layer])
    return (is_own + several) * used


def _weights(*modules: nn.Module) -> int:
    return size(weight for module in modules for weight in module.parameters())


def _rows(model: Model, batch: int) -> Rows:
    return Rows(batch, model.prompt_tokens, model.response_tokens)


def _place(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    return split_responses(rows.tokens, [rows.prompt] * rows.batch, torch.device("cpu"))


def _entered(top: PolicyTop, rows: Rows, dtype: torch.dtype) -> Tensor:
    """Return what enters the layers that train: states, or tokens where all of them do."""
    return torch.tensor(rows.tokens) if top.first is None else states(rows, top.value.in_features, dtype)


def _as_run(model: Model) -> Model:
    """Return the settings with what "auto" means here."""
    device = device_kind(model.device)
    return model.model_copy(update={"device": device, "dtype": dtype_name(model.dtype, device)})


def _on_processor(model: Model) -> Model:
    """Return the settings with which empty tensors run."""
    return model.model_copy(update={"device": "cpu"})
