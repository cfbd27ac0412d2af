"""How a kind of model runs: layer by layer where that gives what it says itself. Tried: no list is ever complete.

What is tried is a small model of its make with random weights: what a configuration says, such as a sliding window, a
scaled embedding or a capped score, shows in those as in the real ones, and costs no memory.
"""

import json
from functools import cache
from typing import Any

import torch

from rrlhf.models.layers import PACKED, ages, grow, prefill, register

TOLERANCE = 1e-4  # share of the norm; rounding makes 1e-6, another computation 1e-2
MOST_LAYERS = 8
SHORT, LONG = 6, 64  # tokens of the rows that are tried; the long one is longer where something depends on it
NOT_BATCHED = {"dynamic", "longrope"}  # rotary embeddings that change for a whole batch with its longest row


def refusal(config: Any, tokens: int) -> str | None:
    """Say why a model of this configuration cannot be run on rows of up to so many tokens; None: it can."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        return f"it was made for {limit} tokens (max_position_embeddings), and prompt and response take {tokens}"
    rope: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    kind, unchanged = rope.get("rope_type"), rope.get("original_max_position_embeddings", limit)
    if kind in NOT_BATCHED and unchanged is not None and tokens > unchanged:
        return (
            f"its rotary embedding ({kind}) changes for a whole batch when one row is longer than {unchanged} tokens, "
            f"and prompt and response take {tokens}"
        )
    return None


def why_whole(config: Any, tokens: int, attention: str = "auto") -> str | None:
    """Say why a model of this configuration does not run by layers on rows of up to so many tokens; None: it does.

    attention: `model.attn_implementation`; where rows stand end to end, the attention is ours, on "sdpa".
    """
    if attention not in {"auto", "sdpa"}:
        return f"its attention is {attention} (model.attn_implementation)"
    make: Any = type(config)
    window = getattr(config, "sliding_window", None) or 0
    described = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _tried(make, described, min(tokens, max(LONG, window + SHORT)))


@cache
def _tried(kind: Any, described: str, tokens: int) -> str | None:
    make = f"its layers (model_type {kind.model_type})"
    try:
        own, ours = _twins(kind, json.loads(described))
        same = _say_the_same(own, ours, tokens)
    except Exception as error:  # noqa: BLE001 - whatever another make raises: it is told, with what was tried
        return f"{make} do not run one by one as those of the Llama family do ({type(error).__name__}: {error})"
    return None if same else f"{make} run one by one give another result than the model's own forward pass"


def _twins(kind: Any, described: dict[str, Any]) -> tuple[Any, Any]:
    """Return two equal small models of a make, the first with its own attention."""
    from transformers import AutoModelForCausalLM

    described |= {"vocab_size": 64, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    for size in ("intermediate_size", "moe_intermediate_size"):
        if described.get(size):
            described[size] = min(described[size], 64)
    kinds = described.get("layer_types") or [None] * described["num_hidden_layers"]
    needed = max(kinds.index(each) for each in set(kinds)) + 1
    layers = min(max(needed, 2), MOST_LAYERS, len(kinds))
    described["num_hidden_layers"] = layers
    if described.get("layer_types"):
        described["layer_types"] = kinds[:layers]
    config = kind.from_dict(described)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for weight in own.parameters():
            torch.nn.init.normal_(weight, *((0.0, weight.shape[-1] ** -0.5) if weight.dim() > 1 else (0.7, 0.2)))
        ours = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ours.load_state_dict(own.state_dict())
    register()
    ours.set_attn_implementation(PACKED)
    return own, ours


@torch.no_grad()
def _say_the_same(own: Any, ours: Any, tokens: int) -> bool:
    """Whether rows run together by layers, at once and the last token by itself, give what each gives alone."""
    from transformers import DynamicCache

    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([tokens, min(SHORT, tokens)])
    rows = [torch.randint(0, 64, (length,), generator=draw).tolist() for length in lengths.tolist()]
    layers = len(ours.model.layers)
    whole = prefill(ours, rows, layers)
    logits = ours.lm_head(ours.model.norm(whole.packing.grid(whole.last)))
    expected = [own(torch.tensor([row])).logits[0] for row in rows]
    together = [grid[: len(row)] for grid, row in zip(logits, rows, strict=True)]
    cache, width = DynamicCache(), max(map(len, rows)) - 1
    prefill(ours, [row[:-1] for row in rows], layers, cache)
    last = torch.tensor([row[-1] for row in rows])
    grown, _ = grow(ours, last, lengths - 1, ages(lengths - 1, width, 1), cache)
    after = list(ours.lm_head(ours.model.norm(grown)))
    pairs = [*zip(together, expected, strict=True), *zip(after, [each[-1] for each in expected], strict=True)]
    return all(bool((one - other).norm() <= TOLERANCE * other.norm()) for one, other in pairs)
