"""States of given rows of tokens, of a model that runs by its layers or whole."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rrlhf.config import Model
from rrlhf.models.layers import Packing, prefill, run_layers
from rrlhf.models.load import LanguageModel
from rrlhf.models.processes import autocast
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


class Below:
    """What the layers below `first` leave of rows of tokens: worked out once and kept on the CPU, or at every use."""

    def __init__(
        self, language: LanguageModel, rows: Sequence[Sequence[int]], first: int | None, model: Model, *, keep: bool
    ) -> None:
        self._language, self._rows, self._first, self._model = language, rows, first, model
        self._keep = keep and first is not None and language.by_layers  # else they are tokens
        self._kept: dict[int, Tensor] = {}  # by row, [tokens, width]

    def __call__(self, index: Sequence[int]) -> Tensor:
        """Return what enters layer `first` for some rows, as `entering` does."""
        if not self._keep:
            return self._read(index)
        if missing := [i for i in dict.fromkeys(index) if i not in self._kept]:
            for i, row in zip(missing, self._read(missing).cpu(), strict=True):
                self._kept[i] = row[: len(self._rows[i])].clone()
        return pad_sequence([self._kept[i] for i in index], batch_first=True).to(self._language.device)

    @torch.no_grad()
    def _read(self, index: Sequence[int]) -> Tensor:
        with autocast(self._model):
            return entering(self._language, [self._rows[i] for i in index], self._first)


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
