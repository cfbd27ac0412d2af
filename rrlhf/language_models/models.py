"""Language models: where they come from, how text becomes tokens, and their layers run one range at a time.

Running layers by range is what lets one pass through the frozen lower layers serve the policy, the reference, the
value function and the reward features. It asks for a decoder of the Llama family's layout (`model.layers`,
`model.rotary_emb`, `model.norm`, `lm_head`), which Llama, Mistral, Qwen and SmolLM share.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rrlhf.config import Model
from rrlhf.hardware import device_kind, dtype_name
from rrlhf.identity.memo import sha256
from rrlhf.language_models.attention import PACKED, Packing, register
from rrlhf.language_models.sources import base_location
from rrlhf.language_models.trial import say_the_same, trial_tokens
from rrlhf.types import Message

Row = TypeVar("Row")
Part = TypeVar("Part")

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class LanguageModel(NamedTuple):
    """A causal language model with its tokenizer."""

    network: Any  # transformers.PreTrainedModel
    tokenizer: Any  # transformers.PreTrainedTokenizerFast

    @property
    def layers(self) -> int:
        """How many decoder layers it has."""
        return len(self.network.model.layers)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return torch.device(self.network.device)


def accelerator(model: Model) -> Accelerator:
    """Return the device and the processes of this run. Precision is ours (`autocast`): heads stay in float32."""
    return Accelerator(cpu=device_kind(model.device) == "cpu")


def autocast(model: Model) -> torch.autocast:
    """Return the context in which a language model's layers run."""
    device = device_kind(model.device)
    return torch.autocast(device, torch.bfloat16, enabled=dtype_name(model.dtype, device) == "bfloat16")


def microbatches(
    engine: Accelerator, network: nn.Module, rows: list[Row], size: int
) -> Iterator[tuple[list[Row], AbstractContextManager[object]]]:
    """Split a batch into parts that fit in memory, each with the context of its backward pass.

    Gradients accumulate over the parts and are exchanged between processes with the last one only.
    """
    yield from accumulated(engine, network, [rows[i : i + size] for i in range(0, len(rows), size)])


def accumulated(
    engine: Accelerator, network: nn.Module, parts: Sequence[Part]
) -> Iterator[tuple[Part, AbstractContextManager[object]]]:
    """Yield the parts of a batch, each with the context of its backward pass: only the last exchanges gradients."""
    for part in parts[:-1]:
        yield part, engine.no_sync(network)
    yield parts[-1], contextlib.nullcontext()


def load_base(model: Model) -> LanguageModel:
    """Load `model.base` from a hub id, a folder, a GGUF file, a package, or make it at random."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if model.base.startswith("random:"):
        return _random_model(model.base)
    place = base_location(model)
    if isinstance(place, Path) and place.suffix == ".gguf":
        return load_model(_converted(place))
    options = {"revision": model.revision} if model.revision else {}
    network = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
    return _ready(LanguageModel(network, AutoTokenizer.from_pretrained(place, **options)), model.base)


def _converted(gguf: Path) -> Path:
    """Return the folder with a GGUF file's weights as plain tensors; converted once: parsing takes half a minute."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rrlhf" / "base"
    folder = cache / sha256(gguf)
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as beside:
        network = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        staged = Path(beside) / "model"
        save_model(LanguageModel(network, tokenizer), staged)
        with contextlib.suppress(OSError):  # another process was first
            staged.rename(folder)
    return folder


def load_model(folder: Path) -> LanguageModel:
    """Load a saved model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _ready(LanguageModel(network, tokenizer), str(folder))


def save_model(language: LanguageModel, folder: Path) -> None:
    """Write a folder that transformers loads: safetensors weights, config and tokenizer."""
    language.network.save_pretrained(folder)
    language.tokenizer.save_pretrained(folder)


def encode_prompt(language: LanguageModel, prompt: list[Message], model: Model) -> list[int]:
    """Return a prompt's tokens up to where the assistant begins, cut from the left to `model.prompt_tokens`.

    Only the chat template may produce special tokens; what users wrote is encoded as plain text.
    """
    turns = list(prompt)
    if not turns or turns[0]["role"] != "system":
        turns = [Message(role="system", content=model.system_prompt), *turns]
    marked = [Message(role=turn["role"], content=f"\ue000{i}\ue001") for i, turn in enumerate(turns)]
    text = language.tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    tokens: list[int] = []
    for i, part in enumerate(re.split("\ue000(\\d+)\ue001", text)):
        is_content = i % 2 == 1
        tokens += encode_text(language, turns[int(part)]["content"]) if is_content else _template_tokens(language, part)
    return tokens[-model.prompt_tokens :]


def encode_text(language: LanguageModel, text: str) -> list[int]:
    """Return a text's tokens; nothing in it is read as a special token."""
    encoded = language.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])


def decode(language: LanguageModel, tokens: list[int]) -> str:
    """Return the text of response tokens, without the end of sequence."""
    return str(language.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def embed(network: Any, tokens: Tensor) -> Tensor:
    """Return input embeddings [batch, tokens, width]."""
    embedded: Tensor = network.model.embed_tokens(tokens)
    return embedded


def run_layers(
    network: Any,
    hidden: Tensor,
    first: int,
    last: int,
    *,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Any = None,
    packing: Packing | None = None,
) -> Tensor:
    """Run decoder layers first..last-1 on hidden states [batch, tokens, width].

    Without a mask, attention is causal: exact for rows padded on the right, and it keeps the fused kernel.
    mask: [batch, 1, queries, keys], True where attention is allowed. packing: of hidden states [1, tokens, width].
    """
    layers = network.model.layers[first:last]
    return through(layers, network.model.rotary_emb, hidden, positions, mask, cache, packing)


def through(
    layers: Any,
    rotary: Any,
    hidden: Tensor,
    positions: Tensor | None,
    mask: Any,
    cache: Any,
    packing: Packing | None = None,
) -> Tensor:
    """Run these decoder layers, as `run_layers` does."""
    if positions is None:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    rotation = rotary(hidden, position_ids=positions)
    for layer in layers:
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_embeddings=rotation,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            packing=packing,
        )
    return hidden


def _template_tokens(language: LanguageModel, text: str) -> list[int]:
    return list(language.tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _runs_by_range(network: Any) -> bool:
    """Whether the layers, run one range at a time, give the network's own logits."""
    body = getattr(network, "model", None)
    if not all(hasattr(body, part) for part in ("layers", "rotary_emb", "norm")):
        return False
    tokens = trial_tokens(network)
    hidden = run_layers(network, embed(network, tokens), 0, len(network.model.layers))
    return say_the_same(network.lm_head(network.model.norm(hidden)), network(tokens).logits)


def _ready(language: LanguageModel, name: str) -> LanguageModel:
    network, tokenizer = language
    network.eval()  # no stage wants dropout
    register()
    network.set_attn_implementation(PACKED)
    if not _runs_by_range(network):
        raise ValueError(f"{name}: a {network.config.model_type} model; rrlhf needs a decoder of the Llama family")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{name}: its tokenizer has no end-of-sequence token")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return language


def _random_model(base: str) -> LanguageModel:
    """Make a tiny character-level Llama, `random:LAYERSxWIDTH`, always the same for the same text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    layers, width = (int(number) for number in base.removeprefix("random:").split("x"))
    special = ["<pad>", "</s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>"]
    ascii_letters = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter.isascii()]
    vocabulary = {token: i for i, token in enumerate([*special, "Ġ", "Ċ", *sorted(ascii_letters)])}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(config)
    return _ready(LanguageModel(network, tokenizer), base)
