"""A policy while it trains: which weights move, the reference that it is compared with, and its whole state.

PPO trains in one of three ways, `ppo.trains`. `layers`: the top layers; below them policy and reference are one, so a
rollout's pass through the frozen layers serves both. `lora`: low-rank adapters in the top layers; without them the same
modules are the reference. `full`: everything, embeddings included, with a reference of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from rrlhf.advantages import has_critic
from rrlhf.config import Model, Ppo
from rrlhf.models.adapters import adapted
from rrlhf.models.load import LanguageModel
from rrlhf.models.processes import trained_weights
from rrlhf.models.rollout import Draws, Samples, sample, tokens_of
from rrlhf.models.shards import loading_device, mesh_of, share_of, spread, whole
from rrlhf.models.top import PolicyTop, Read
from rrlhf.models.whole import decoder_layers
from rrlhf.policy.checkpoint import State
from rrlhf.policy.reference import frozen
from rrlhf.policy.reward import RewardModels
from rrlhf.types import Metrics

Place = tuple[Tensor, Tensor, Tensor, Tensor]  # what enters the layers that train, prompt lengths, responses, mask


@dataclass
class Trained:
    """A policy with all that its optimizer steps change."""

    engine: Accelerator
    language: LanguageModel
    top: PolicyTop
    policy: nn.Module  # `top`, wrapped for data parallelism unless its weights are spread
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    def step(self, max_norm: float) -> float:
        """Take an optimizer step on gradients of norm `max_norm` at most; return the norm that they had."""
        norm = self._clip(max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return norm

    def _clip(self, max_norm: float) -> float:
        norm = self.engine.clip_grad_norm_(self.policy.parameters(), max_norm)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def state(self, **own: Any) -> State:
        """Return what a checkpoint must hold; own: what else there is of this process. All call it together."""
        optimizer = self.optimizer.state_dict()
        optimizer["state"] = {i: {k: whole(v) for k, v in held.items()} for i, held in optimizer["state"].items()}
        weights = {name: whole(weight) for name, weight in self._weights().items()}
        return State({"weights": weights, "optimizer": optimizer, "schedule": self.schedule.state_dict()}, own)

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Put back the weights, the optimizer and its schedule, in place."""
        weights, optimizer = self._weights(), dict(state.shared["optimizer"])
        for name, weight in weights.items():
            weight.copy_(share_of(state.shared["weights"][name], weight))
        each = [*weights.values()]
        optimizer["state"] = {
            i: {name: share_of(value, each[i]) for name, value in held.items()}
            for i, held in optimizer["state"].items()
        }
        self.optimizer.load_state_dict(optimizer)
        self.schedule.load_state_dict(state.shared["schedule"])

    def _weights(self) -> dict[str, Tensor]:
        return {name: weight.detach() for name, weight in self.top.named_parameters() if weight.requires_grad}


@dataclass
class Learner(Trained):
    """All that changes while a policy trains by PPO, and the frozen models that it is compared with."""

    model: Model
    ppo: Ppo
    seed: int
    reference: Callable[..., Read]  # as `PolicyTop.read`
    rewards: RewardModels
    kl_weight: float  # beta as it stands; moves where ppo.kl_target is set
    generator: torch.Generator  # sampling; at the same place in all processes
    shuffle: torch.Generator  # order of minibatches, of which each process has its own
    update: int = 0  # updates that count; a rollback takes some of them back
    rollouts: int = 0  # in all

    @property
    def shares_trunk(self) -> bool:
        """Whether the reward heads' layer lies in the frozen part; else the reference's pass gives its states."""
        layer, first = self.rewards.layer, self.top.first
        return layer is not None and first is not None and layer <= first

    def sample(self, prompts: list[list[int]]) -> Samples:
        """Sample from the policy, and keep the states that enter the trained layers and the reward heads' layer.

        As many processes as there are give the same responses to all prompts, but for rounding.
        """
        wanted = (self.top.first, self.rewards.layer if self.shares_trunk else None)
        layers = tuple(layer for layer in wanted if layer is not None)
        engine = self.engine
        draws = Draws(self.generator, engine.num_processes, engine.process_index, self.ppo.responses_per_prompt)
        return self.top.around(partial(sample, self.language, prompts, self.model.response_tokens, draws, layers))

    def read(self, prompts: list[list[int]], samples: Samples) -> tuple[Place, Read, Read]:
        """Return where the policy's top layers read samples, and what it and the reference say of them.

        One of the two has the states that the reward heads read, if these read any.
        """
        first, layer = self.top.first, self.rewards.layer
        longest = int((samples.prompt_lengths + samples.mask.sum(1)).max())
        entering = tokens_of(prompts, samples) if first is None else samples.states[first][:, :longest]
        place = (entering, samples.prompt_lengths, samples.responses, samples.mask)
        tokens = min(self.ppo.microbatch_tokens, self.ppo.minibatch_size * longest)  # as much memory as a step takes
        reference = self.reference(*place, layer=None if self.shares_trunk else layer, tokens=tokens)
        if samples.top is None or torch.is_autocast_enabled(self.engine.device.type):
            policy = self.top.read(*place, tokens=tokens)  # bfloat16: one row alone rounds differently
        else:
            values = self.top.around(partial(self.top.value, samples.top))
            policy = Read(samples.logprobs, values.float().squeeze(-1), None)
        return place, policy._replace(states=samples.states[layer] if self.shares_trunk and layer else None), reference

    def mean_over_processes(self, metrics: Metrics) -> Metrics:
        """Return the mean over processes of numbers that each of them has."""
        if self.engine.num_processes == 1 or not metrics:
            return metrics
        values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=self.engine.device)
        return dict(zip(metrics, self.engine.reduce(values, reduction="mean").tolist(), strict=True))

    def clip_gradients(self) -> float:
        """Have the next step use gradients of norm `ppo.max_grad_norm` at most; return the norm that they have.

        In one process the fused optimizer divides them as it goes, which spares a walk through all of them.
        """
        if self.engine.num_processes > 1:
            return self._clip(self.ppo.max_grad_norm)
        gradients = [weight.grad for weight in self.top.parameters() if weight.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        inner: Any = self.optimizer
        inner.optimizer.grad_scale = (norm / self.ppo.max_grad_norm).clamp(min=1.0)
        return float(norm)

    def state(self, **own: Any) -> State:
        """Return what a checkpoint must hold; own: what else there is of this process."""
        shared, own, _ = super().state(**own)
        counted = {"kl_weight": self.kl_weight, "update": self.update, "rollouts": self.rollouts}
        return State(shared | counted, own | {"random": [each.get_state() for each in self._generators]})

    def restore(self, state: State) -> None:
        """Put the policy where it was; the order of prompts and all other randomness go on as they are."""
        super().restore(state)
        self.kl_weight, self.update = state.shared["kl_weight"], state.shared["update"]

    def resume(self, state: State) -> None:
        """Put everything where it was, randomness included."""
        self.restore(state)
        self.rollouts = state.shared["rollouts"]
        for generator, random in zip(self._generators, state.own["random"], strict=True):
            generator.set_state(random)

    @property
    def _generators(self) -> tuple[torch.Generator, ...]:
        return self.generator, self.shuffle, torch.default_generator


def prepare_learner(
    engine: Accelerator, language: LanguageModel, rewards: RewardModels, *, model: Model, ppo: Ppo, seed: int
) -> Learner:
    """Freeze what does not train and build PPO's optimizer."""
    language.network.requires_grad_(False).to(loading_device(engine))
    language, top, reference = trainable(language, ppo, mesh_of(engine))
    top.value.requires_grad_(has_critic(ppo))
    own = seed * 1000
    return Learner(
        **vars(with_optimizer(engine, language, top, ppo.learning_rate, ppo.updates)),
        model=model,
        ppo=ppo,
        seed=seed,
        reference=reference,
        rewards=rewards,
        kl_weight=ppo.kl_weight,
        generator=torch.Generator(engine.device).manual_seed(own),
        shuffle=torch.Generator().manual_seed(own + engine.process_index),
    )


def top_layers(language: LanguageModel, device: torch.device, train_layers: int | None) -> PolicyTop:
    """Let the top layers and the last norm train, and no value head; None: everything."""
    language.network.requires_grad_(False).to(device)
    top = PolicyTop(language, None if train_layers is None else language.layers - train_layers)
    top.let_train()
    top.value.requires_grad_(False)
    return top


def with_optimizer(
    engine: Accelerator, language: LanguageModel, top: PolicyTop, learning_rate: float, steps: int, **adam: Any
) -> Trained:
    """Build the optimizer of the weights that train; its learning rate falls to 0 in so many steps of its schedule."""
    mesh, weights = mesh_of(engine), trained_weights(top)
    if mesh:
        top.spread(mesh)
        spread(below(language, top), mesh)
        weights = [weight for weight in top.parameters() if weight.requires_grad]
    if engine.num_processes == 1 and engine.device.type == "cpu":
        top.spare_embeddings()
    optimizer = torch.optim.Adam(weights, lr=learning_rate, **{"eps": 1e-5, "fused": True} | adam)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    policy = top if mesh else engine.prepare(top)
    optimizer = engine.prepare(optimizer)
    return Trained(engine, language, top, policy, optimizer, schedule)


def below(language: LanguageModel, top: PolicyTop) -> list[nn.Module]:
    """Return the embeddings and the layers below those that a policy has itself."""
    if top.first is None:
        return []
    return [language.network.get_input_embeddings(), *decoder_layers(language.network)[: top.first]]


def trainable(
    language: LanguageModel, ppo: Ppo, mesh: DeviceMesh | None = None
) -> tuple[LanguageModel, PolicyTop, Callable[..., Read]]:
    """Let the weights of `ppo.trains` move; return the model, what trains of it, and its reference.

    That is the policy before the first step; if it is a second model, it is spread over `mesh`.
    """
    first = None if ppo.trains == "full" else language.layers - ppo.train_layers
    if ppo.trains == "lora":
        language = adapted(language, range(first or 0, language.layers), ppo.lora_rank, targets=ppo.lora_targets)
        top = PolicyTop(language, first)
        return language, top, _without_adapters(top, language)
    top = PolicyTop(language, first)
    top.let_train()
    return language, top, frozen(top, language, mesh)


def _without_adapters(top: PolicyTop, language: LanguageModel) -> Callable[..., Read]:
    """Return the reference that the policy's own modules are without their adapters."""

    def read(*arguments: Any, **options: Any) -> Read:
        with language.adapters.disable_adapter():
            return top.read(*arguments, **options)

    return read
