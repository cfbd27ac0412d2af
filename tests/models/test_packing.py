"""Packed rows: the same numbers as each row alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rrlhf.models.layers import Packing
from rrlhf.models.load import load_base
from rrlhf.models.top import PolicyTop


@pytest.fixture(scope="module")
def language(model):
    return load_base(model)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 3))
def test_packing_is_undone_by_the_grid(lengths, spare):
    width = max(lengths)
    grid = torch.arange(1.0, 1 + len(lengths) * (width + spare) * 2).view(len(lengths), -1, 2)
    packing = Packing.of(torch.tensor(lengths))
    packed = packing.packed(grid)
    assert packed.shape == (1, sum(lengths), 2)
    assert packing.positions[0].tolist() == [at for length in lengths for at in range(length)]
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    assert torch.equal(packing.grid(packed), grid[:, :width] * inside[..., None])
    row, column = inside.nonzero(as_tuple=True)
    assert packing.flat(row, column).tolist() == list(range(sum(lengths)))


ROWS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=6)


@given(ROWS)
def test_rows_share_the_tokens_that_they_begin_with_and_no_others(rows):
    tokens, packing = Packing.sharing(rows, torch.device("cpu"))
    assert len(tokens) == len({tuple(row[: i + 1]) for row in rows for i in range(len(row))})
    grid = packing.grid(1.0 + tokens[None, :, None])[..., 0]
    assert [(part[part > 0] - 1).tolist() for part in grid] == rows
    assert torch.equal(packing.packed(grid), 1.0 + tokens[None])
    for number, row in enumerate(rows):
        at = packing.flat(torch.full((len(row),), number), torch.arange(len(row)))
        assert tokens[at].tolist() == row
        assert packing.positions[0, at].tolist() == list(range(len(row)))


@pytest.mark.parametrize("first", [None, 1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_read_together_give_what_each_gives_alone_and_the_same_gradient(language, first, seed):
    draw = torch.Generator().manual_seed(seed)
    top = PolicyTop(language, first).requires_grad_(True)
    prompts, steps = torch.tensor([5, 2, 9]), torch.tensor([4, 6, 1])
    tokens = torch.randint(3, 60, (3, 15), generator=draw)
    entering = tokens if first is None else torch.randn(3, 15, 32, generator=draw)
    mask = torch.arange(6) < steps[:, None]
    responses = torch.randint(3, 60, (3, 6), generator=draw)

    def gradient(rows):
        top.zero_grad()
        found = [top.read(entering[i], prompts[i], responses[i], mask[i], layer=2) for i in rows]
        sum(read.logprobs.sum() + read.values.sum() for read in found).backward()
        return found, [parameter.grad.clone() for parameter in top.parameters()]

    together, whole = gradient([slice(0, 3)])
    alone, summed = gradient([slice(0, 1), slice(1, 2), slice(2, 3)])
    torch.testing.assert_close(together[0].logprobs, torch.cat([read.logprobs for read in alone]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[0].values, torch.cat([read.values for read in alone]), atol=1e-5, rtol=1e-5)
    unread = top(entering, prompts, responses, mask)  # without states, for which alone the last tokens are read
    torch.testing.assert_close(unread, (together[0].logprobs, together[0].values), atol=1e-5, rtol=1e-5)
    for row, read in enumerate(alone):
        kept = together[0].states[row, : read.states.shape[1]]
        torch.testing.assert_close(kept, read.states[0], atol=1e-5, rtol=1e-5)
    for one, other in zip(whole, summed, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
