"""What is trained gets the gradients that autograd gives it, however they are added up."""

import pytest
import torch
from accelerate import Accelerator
from conftest import TINY
from transformers import LlamaConfig, LlamaForCausalLM

from rrlhf.models.load import load_base, load_model, save_model
from rrlhf.policy.learner import top_layers, with_optimizer


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_get_the_gradient_of_all_their_uses(model, tmp_path, tied):
    base = load_base(model)
    config = LlamaConfig(**TINY, vocab_size=len(base.tokenizer), tie_word_embeddings=tied, eos_token_id=1)
    save_model(base._replace(network=LlamaForCausalLM(config), generation=None), tmp_path)
    language = load_model(tmp_path, model)
    trained = with_optimizer(Accelerator(cpu=True), language, top_layers(language, "cpu", None), 1e-3, steps=1)
    tokens, prompts = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0)), torch.tensor([4, 5, 4])

    def gradient():
        trained.optimizer.zero_grad()
        logprobs, _ = trained.policy(tokens, prompts, tokens[:, 5:], torch.ones(3, 4).bool())
        logprobs.sum().backward()
        return trained.top.embed.weight.grad

    spared = gradient()
    assert spared.layout == torch.strided
    assert trained.top.embed.sparse == tied
    trained.top.embed.sparse = False
    torch.testing.assert_close(spared, gradient(), atol=1e-5, rtol=1e-5)
    assert trained.step(1.0) > 0
