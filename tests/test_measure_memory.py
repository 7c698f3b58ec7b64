"""The rules of docs/measure_memory.py: which token a head writes over."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "docs" / "measure_memory.py"
SLOTS = 8


@pytest.fixture(scope="module")
def rules():
    spec = importlib.util.spec_from_file_location("measure_memory", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seen(rules, keys: list[int]):
    """Tokens whose keys are equal where their numbers are, and far apart otherwise."""
    k = 10.0 * torch.eye(max(keys) + 1)[keys]
    return rules.Seen(x=k, k=k, attention=torch.zeros(len(keys), len(keys)), whitened=torch.eye(k.shape[1]))


def held(leaves: np.ndarray) -> list[list[int]]:
    """What is kept after every token."""
    return [[j for j in range(t + 1) if leaves[j] > t] for t in range(len(leaves))]


@pytest.mark.parametrize("bonus", [0, 1])
def test_without_equal_keys_the_rule_is_the_window(rules, bonus):
    tokens = seen(rules, list(range(40)))
    assert held(rules.repeated(bonus)(tokens, SLOTS)) == held(rules.window(tokens, SLOTS))


def test_an_equal_key_is_written_over(rules):
    keys = list(range(12))
    keys[10] = keys[7]  # the window keeps 0 to 3 and four more
    kept = held(rules.repeated(0)(seen(rules, keys), SLOTS))
    assert kept[9] == [0, 1, 2, 3, 6, 7, 8, 9]
    assert kept[10] == [0, 1, 2, 3, 6, 8, 9, 10]


def test_what_came_twice_stays_longer(rules):
    keys = list(range(40))
    keys[10] = keys[7]
    once, twice = (rules.repeated(bonus)(seen(rules, keys), SLOTS)[10] for bonus in (0, 1))
    assert twice == once + SLOTS


def test_a_key_that_is_held_no_more_is_no_repeat(rules):
    keys = list(range(40))
    keys[30] = keys[10]
    tokens = seen(rules, keys)
    assert held(rules.repeated(1)(tokens, SLOTS)) == held(rules.window(tokens, SLOTS))
