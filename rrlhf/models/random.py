"""A language model that has learned nothing, so small that a whole run on it takes seconds."""

from typing import Any

import torch

from rrlhf.models.templates import CHAT_TEMPLATE


def random_model(base: str) -> tuple[Any, Any]:
    """Make a tiny character-level Llama, `random:LAYERSxWIDTH`, and its tokenizer: always the same for one text."""
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
    return network, tokenizer
