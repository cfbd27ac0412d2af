"""The part of a language model that trains as a policy, and what it says about given responses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence

from rrlhf.models.layers import Packing, groups, through
from rrlhf.models.load import LanguageModel
from rrlhf.models.shards import in_step, spread
from rrlhf.models.whole import decoder_layers, final_norm, run_whole

Result = TypeVar("Result")


class Read(NamedTuple):
    """What a policy says about given responses."""

    logprobs: Tensor  # [batch, response tokens]; 0 off the mask
    values: Tensor  # [batch, response tokens]; 0 off the mask
    states: Tensor | None  # [batch, tokens, width] that enter the layer that was asked for


def split_responses(
    rows: Sequence[Sequence[int]], prompt_lengths: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `PolicyTop.read` asks for rows of tokens: prompt_lengths, responses and mask."""
    said = [torch.tensor(row[length:], device=device) for row, length in zip(rows, prompt_lengths, strict=True)]
    responses = pad_sequence(said, batch_first=True)
    counts = torch.tensor([len(tokens) for tokens in said], device=device)
    mask = torch.arange(responses.shape[1], device=device) < counts[:, None]
    return torch.tensor(prompt_lengths, device=device), responses, mask


class PolicyTop(nn.Module):
    """The trainable part of a policy with its value head; the language model's own modules, not copies.

    `first` is the layer whose entering states it reads; None: it reads tokens, for its embeddings train too, or for
    the model runs whole.
    """

    def __init__(self, language: LanguageModel, first: int | None) -> None:
        """Take the layers from `first` on; None: the embeddings too."""
        super().__init__()
        network = language.network
        self.trains_all = first is None
        self.first = first if language.by_layers else None
        if language.by_layers:
            self.embed = network.get_input_embeddings() if first is None else None
            self.rotary = network.model.rotary_emb
        self.layers = decoder_layers(network)[first or 0 :]
        self.norm: Any = final_norm(network)
        self.unembed = network.get_output_embeddings()
        self.network = None if language.by_layers else network
        self.value = nn.Linear(language.width, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        self.to(language.device)

    def let_train(self) -> None:
        """Let the layers and the last norm train, or all of the model where there was no `first`.

        The output matrix, the largest by far and in many models the embeddings as well, trains with all of it only.
        """
        for part in (self,) if self.trains_all else (self.layers, self.norm, self.value):
            if part is not None:
                part.requires_grad_(True)

    def spare_embeddings(self) -> None:
        """Have embeddings that are the output matrix too add their gradient to its, of the tokens alone that there are.

        As a matrix of its own, nearly all zeros, it would cost a seventh of a training. Several processes need that.
        """
        if self.network is None and self.embed is not None:
            self.embed.sparse = self.embed.weight is self.unembed.weight

    def forward(
        self, entering: Tensor, prompt_lengths: Tensor, responses: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and values of response tokens, both [batch, response tokens]; 0 off the mask."""
        logprobs, values, _ = self._read(entering, prompt_lengths, responses, mask, None)
        return logprobs, values

    def around(self, run: Callable[[], Result]) -> Result:
        """Return what `run` returns, which calls parts of this; those around the layers are gathered meanwhile."""
        return run()

    @property
    def apart(self) -> nn.ModuleList:
        """The layers, which are gathered one at a time where weights are spread."""
        return self.layers if self.network is None else decoder_layers(self.network)

    def spread(self, mesh: DeviceMesh) -> None:
        """Have every process keep its share of the weights alone, in place; what is called gathers what it needs."""
        spread([*self.apart, self], mesh)
        for method in ("read", "around"):
            register_fsdp_forward_method(self, method)

    def read(
        self,
        entering: Tensor,
        prompt_lengths: Tensor,
        responses: Tensor,
        mask: Tensor,
        layer: int | None = None,
        tokens: int | None = None,
    ) -> Read:
        """Read responses, with the states that enter `layer`, counted from the network's first.

        entering: what the frozen layers left, [batch, tokens, width], or tokens [batch, tokens] where everything
        trains; padded on the right. Logits, the largest tensor by far, exist only for the tokens that count. tokens:
        read so many at a time, in a pass without gradients; None: all of them.
        """
        if tokens is None:
            return self._read(entering, prompt_lengths, responses, mask, layer)
        logprobs, values = (torch.zeros(mask.shape, device=mask.device) for _ in range(2))
        states = None
        steps = mask.sum(1)
        for rows, _ in in_step(groups(prompt_lengths + steps, tokens), mask.device):
            longest, most = int((prompt_lengths + steps)[rows].max()), int(steps[rows].max())
            part = entering[rows, :longest], prompt_lengths[rows], responses[rows, :most], mask[rows, :most]
            read = self._read(*part, layer)
            logprobs[rows, :most], values[rows, :most] = read.logprobs, read.values
            if read.states is not None:
                if states is None:
                    states = read.states.new_zeros(*entering.shape[:2], read.states.shape[2])
                states[rows, :longest] = read.states
        return Read(logprobs, values, states)

    def _read(
        self, entering: Tensor, prompt_lengths: Tensor, responses: Tensor, mask: Tensor, layer: int | None
    ) -> Read:
        row, step = mask.nonzero(as_tuple=True)
        column = prompt_lengths[row] + step - 1  # of the token before each response token
        if self.network is None:
            unread = int(layer is None)  # tokens: a row's last one predicts nothing, but its states may be wanted
            packing = Packing.of(prompt_lengths + mask.sum(1) - unread)
            hidden, below = packing.packed(entering), 0 if layer is None else layer - (self.first or 0)
            hidden = hidden if self.embed is None else self.embed(hidden)
            entered = through(self.layers[:below], self.rotary, hidden, packing=packing)
            hidden = through(self.layers[below:], self.rotary, entered, packing=packing)
            final = self.norm(hidden[0, packing.flat(row, column)])
            logits, states = self.unembed(final), None if layer is None else packing.grid(entered)
        else:
            logits, final, states = run_whole(self.network, entering, (row, column), layer)
        logprobs = -nn.functional.cross_entropy(logits.float(), responses[mask], reduction="none")
        values = self.value(final).float().squeeze(-1)
        empty = torch.zeros(mask.shape, device=final.device)
        return Read(empty.masked_scatter(mask, logprobs), empty.masked_scatter(mask, values), states)

    def reference(self) -> PolicyTop:
        """Return a frozen copy of what trains; it shares the rest, and so is the policy before the first step."""
        shared = {id(weight): weight for weight in self.parameters() if not weight.requires_grad}
        return copy.deepcopy(self, shared).requires_grad_(False).eval()
