"""Heads of different sizes, split into groups of one size and joined again."""

import pytest
import torch

from t2r.model.mixers.groups import head_groups, join_heads, split_heads
from t2r.model.sequence import SequenceInfo

GROUPS = head_groups((5, 7, 5, 11), 4, "slots")


@pytest.mark.parametrize("group", [1, 3])
def test_a_token_is_split_as_many_are_and_its_parts_are_contiguous(group):
    x = torch.randn(1, 3, 4 * group, 2)
    parts = split_heads(x, GROUPS)
    assert [part.shape[-2] for part in parts] == [2 * group, group, group]
    assert torch.equal(parts[0], torch.cat([x[..., :group, :], x[..., 2 * group : 3 * group, :]], -2))
    assert torch.equal(join_heads(parts, GROUPS), x)
    for t in range(3):
        alone = split_heads(x[:, t : t + 1], GROUPS)
        assert all(torch.equal(one, part[:, t : t + 1]) for one, part in zip(alone, parts, strict=True))
        assert all(one.is_contiguous() for one in alone)


def test_slots_written_so_far():
    info = SequenceInfo.build(2, 4, torch.device("cpu"), attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]))
    assert info.visible(3).tolist() == [[1, 1, 2, 3], [1, 2, 3, 3]]
    assert info.visible(3) is info.visible(3)
    assert info.visible(8)[1].tolist() == [1, 2, 3, 4]
