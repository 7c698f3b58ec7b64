"""Key/value heads of one layer that differ in size (slots of `gsa`, window of `softmax`): those of one size run
together, and each group has inputs and states of its own."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BeforeValidator, Discriminator, Field, Tag
from torch import Tensor

from t2r.errors import InputError


def _as_tuple(value: Any) -> Any:
    """YAML and JSON have lists alone."""
    return tuple(value) if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list | tuple) else "number"


_Size = Annotated[int, Field(ge=1)]
_Each = Annotated[tuple[_Size, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
# An option with one number for all key/value heads, or a list with one for each.
HeadSizes = Annotated[Annotated[_Size, Tag("number")] | Annotated[_Each, Tag("list")], Discriminator(_kind)]


class HeadGroup(NamedTuple):
    """Key/value heads of the same size."""

    heads: list[int]
    size: int


def head_groups(sizes: int | tuple[int, ...], heads: int, option: str) -> list[HeadGroup]:
    """The groups of a layer with so many key/value heads, in the order of their first heads.

    Raises:
        InputError: a list for another number of heads. `option` names it.
    """
    each = sizes if isinstance(sizes, tuple) else (sizes,) * heads
    if len(each) != heads:
        raise InputError(f"mixer {option}: {len(each)} numbers, must be one for each of {heads} key/value heads")
    return [HeadGroup([head for head in range(heads) if each[head] == size], size) for size in dict.fromkeys(each)]


def split_heads(x: Tensor, groups: Sequence[HeadGroup]) -> list[Tensor]:
    """x [..., H * G, D] of all key/value heads (G query heads of each, or 1), group by group."""
    if len(groups) == 1:
        return [x]
    parts = x.chunk(sum(len(group.heads) for group in groups), dim=-2)
    return [torch.cat([parts[head] for head in group.heads], dim=-2) for group in groups]


def join_heads(parts: Sequence[Tensor], groups: Sequence[HeadGroup]) -> Tensor:
    """The inverse of `split_heads`."""
    if len(groups) == 1:
        return parts[0]
    heads: dict[int, Tensor] = {}
    for group, part in zip(groups, parts, strict=True):
        heads |= zip(group.heads, part.chunk(len(group.heads), dim=-2), strict=True)
    return torch.cat([heads[head] for head in range(len(heads))], dim=-2)
