import copy

import pytest
import torch

from uc_adapters.layers.attention import Attention, head_count


@pytest.mark.parametrize("width", [1, 7, 8, 64, 96, 127, 128, 512, 1024])
def test_heads_divide_the_width(width):
    assert width % head_count(width) == 0


def test_heads_are_64_wide_where_that_fits():
    assert head_count(512) == 8


def test_a_masked_key_has_no_influence():
    attention = Attention(16)
    x, source = torch.randn(1, 3, 16), torch.randn(1, 4, 16)
    other = source.clone()
    other[:, 3] += 5
    mask = torch.tensor([True, True, True, False]).expand(3, 4)
    ours, theirs = (attention(x, attention.keys_values(keys), mask) for keys in (source, other))
    assert torch.equal(ours, theirs)


def test_a_copy_gives_the_same_bits():
    attention = Attention(128)
    x = torch.randn(2, 9, 128)
    again = copy.deepcopy(attention)
    again.load_state_dict(attention.state_dict())
    assert torch.equal(attention(x, attention.keys_values(x)), again(x, again.keys_values(x)))
