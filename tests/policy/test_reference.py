"""The reference is what the policy was, wherever its weights are."""

import pytest
import torch

from rrlhf.models.load import load_base, load_model, save_model
from rrlhf.models.top import PolicyTop
from rrlhf.policy.reference import frozen


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def folder(request, model, tmp_path_factory):
    """A model's folder with weights as they are in memory, and as most models that people have are."""
    made = tmp_path_factory.mktemp("sft")
    save_model(load_base(model)._replace(dtype=request.param), made)
    return made


def said(read):
    draw = torch.Generator().manual_seed(0)
    tokens, prompts = torch.randint(3, 60, (2, 9), generator=draw), torch.tensor([4, 5])
    return read(tokens, prompts, tokens[:, 5:], torch.ones(2, 4).bool())


@torch.no_grad()
@pytest.mark.parametrize("is_changed", [False, True])
def test_the_reference_stays_what_the_policy_was(folder, model, is_changed):
    language = load_model(folder, model)
    top = PolicyTop(language, None)
    top.let_train()
    if is_changed:  # so that the file holds other weights
        top.layers[0].mlp.up_proj.weight.mul_(2)
    before = said(top.read)
    read = frozen(top, language)
    for weight in top.parameters():
        weight.add_(0.1)
    torch.testing.assert_close(said(read).logprobs, before.logprobs, atol=1e-6, rtol=0)
