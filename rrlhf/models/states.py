"""States of given rows of tokens, of a model that runs by its layers or whole."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rrlhf.models.layers import Packing, prefill, run_layers
from rrlhf.models.load import LanguageModel
from rrlhf.models.whole import run_whole


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return rows of tokens as one tensor [batch, tokens], padded on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)


def entering(language: LanguageModel, rows: Sequence[Sequence[int]], first: int | None) -> Tensor:
    """Return what enters layer `first`, padded on the right, without gradients: states [batch, tokens, width].

    They are tokens [batch, tokens] where `first` is None, or the model runs whole.
    """
    if first is None or not language.by_layers:
        return padded(rows, language.device)
    found = prefill(language.network, [list(row) for row in rows], first)
    return found.packing.grid(found.last)


def states_at(language: LanguageModel, entered: Tensor, lengths: Tensor, first: int, layer: int) -> Tensor:
    """Return the states [batch, tokens, width] that enter `layer`, of what `entering` gives; lengths: [batch]."""
    if not language.by_layers:
        nowhere = torch.zeros(2, 0, dtype=torch.long, device=language.device)
        states = run_whole(language.network, entered, (nowhere[0], nowhere[1]), layer).states
        assert states is not None
        return states
    packing = Packing.of(lengths)
    return packing.grid(run_layers(language.network, packing.packed(entered), first, layer, packing=packing))


def final_states(language: LanguageModel, entered: Tensor, lengths: Tensor, first: int) -> Tensor:
    """Return what the output matrix reads at the last token of each row, [batch, width], of what `entering` gives."""
    rows, last = torch.arange(len(lengths), device=lengths.device), lengths - 1
    if not language.by_layers:
        return run_whole(language.network, entered, (rows, last)).final
    packing = Packing.of(lengths)
    hidden = run_layers(language.network, packing.packed(entered), first, language.layers, packing=packing)
    final: Tensor = language.network.model.norm(hidden[0, packing.flat(rows, last)])
    return final


@torch.no_grad()
def hidden_states(language: LanguageModel, rows: Sequence[Sequence[int]], layer: int) -> Tensor:
    """Return the states that enter `layer` for rows of tokens, padded on the right, [batch, tokens, width]."""
    entered = entering(language, rows, layer)
    if language.by_layers:
        return entered
    return states_at(language, entered, torch.tensor([len(row) for row in rows]), 0, layer)
