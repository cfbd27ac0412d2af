"""Reward models as people have them, tiny and random: sequence classifiers of several makes, with own tokenizers."""

import torch
import transformers
from conftest import TINY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ 'Q: ' if m.role == 'user' else 'A: ' }}{{ m.content }}</s>{% endfor %}"
)
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 2, "n_positions": 128}
MAKES = {  # configuration, sizes, template, token that its configuration calls padding
    "Llama, whose padding is its end": (transformers.LlamaConfig, TINY, TURNS, "</s>"),
    "Qwen 2": (transformers.Qwen2Config, TINY | {"hidden_size": 16}, CHATML, "<|endoftext|>"),
    "GPT-2 without padding": (transformers.GPT2Config, GPT2, TURNS, None),
    "Gemma 2": (transformers.Gemma2Config, TINY | {"head_dim": 8}, CHATML, "<|endoftext|>"),
    "Phi": (transformers.PhiConfig, TINY, CHATML, "<|endoftext|>"),
}
LLAMA, QWEN, GPT, *_ = MAKES


def tokenizer(template):
    """Return bytes as tokens, in another order for every template, with special tokens of its own."""
    special = ["<s>", "</s>"] if template == TURNS else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=template == TURNS)
    bytewise = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *letters])}, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens(special)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytewise, eos_token="</s>" if template == TURNS else "<|im_end|>", chat_template=template
    )


def saved(folder, name, labels=1, **further):
    """Save a random reward model of a make, and return where."""
    config, sizes, template, padding = MAKES[name]
    own = tokenizer(template)
    ids = {"vocab_size": len(own), "bos_token_id": None, "eos_token_id": own.eos_token_id}
    ids["pad_token_id"] = None if padding is None else own.convert_tokens_to_ids(padding)
    torch.manual_seed(0)
    network = transformers.AutoModelForSequenceClassification.from_config(
        config(**sizes | further, **ids, num_labels=labels)
    )
    for weight in network.parameters():
        torch.nn.init.normal_(weight, *((0.0, weight.shape[-1] ** -0.5) if weight.dim() > 1 else (0.7, 0.2)))
    network.save_pretrained(folder)
    own.save_pretrained(folder)
    return str(folder)
