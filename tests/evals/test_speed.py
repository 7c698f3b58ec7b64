"""What a speed measurement reports can be checked where it is arithmetic: tokens, bytes, and that time passes."""

import math
from typing import Any

import pytest

from t2r_evals import speed
from t2r_evals.speed import crossover, measure_speed
from t2r_evals.speed_step import measure_step


def test_cache_bytes_are_those_of_the_architecture(model: Any) -> None:
    points = list(measure_speed(model, [8, 32], decode_tokens=4, repeats=1))
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert [p.context for p in points] == [8, 32]
    # The last of the 1 + 4 new tokens is never fed back.
    assert [p.state_bytes for p in points] == [per_token * (8 + 4), per_token * (32 + 4)]
    for point in points:
        assert point.batch == 1
        assert point.first_token_seconds > 0
        assert point.decode_tokens_per_second > 0
        assert point.prefill_tokens_per_second == point.context / point.first_token_seconds


def test_rates_are_of_the_fastest_after_a_warm_up_of_the_same_lengths(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def generate(model: Any, prompt: Any, tokens: int, options: Any) -> tuple[list[float], int]:
        asked.append((len(prompt), tokens))
        return [len(asked) + 0.5 * token for token in range(tokens)], 7

    monkeypatch.setattr(speed, "_generate", generate)
    (point,) = measure_speed(model, [16], decode_tokens=4, repeats=2)
    assert asked == [(1, 5)] * 3
    assert (point.first_token_seconds, point.prefill_tokens_per_second) == (2.0, 8.0)
    assert (point.decode_tokens_per_second, point.state_bytes) == (2.0, 7)


def test_larger_batches_are_measured_beside_batch_one(model: Any) -> None:
    points = list(measure_speed(model, [8], decode_tokens=2, largest_batch=4, repeats=1))
    assert [p.batch for p in points] == [1, 4]
    assert points[1].state_bytes == 4 * points[0].state_bytes


def test_a_step_by_itself_reads_a_cache_of_the_context(model: Any) -> None:
    config = model.config
    usual = config._attn_implementation
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    for context, batch in ((8, 1), (300, 3)):
        point = measure_step(model, context, batch, steps=2, repeats=1)
        assert (point.context, point.batch, point.state_bytes) == (context, batch, per_token * context * batch)
        assert point.tokens_per_second == pytest.approx(batch / point.step_seconds)
    assert config._attn_implementation == usual


@pytest.mark.parametrize(
    ("student", "teacher", "found"),
    [
        ([4, 4, 4], [1, 4, 16], pytest.approx(100)),  # meets the teacher exactly at a measured length
        ([2, 2, 2], [1, 4, 16], pytest.approx(10**1.5)),  # a straight line in logarithms between 10 and 100
        ([1, 1, 1], [2, 2, 2], 10),
        (
            [1, 3, 1],
            [2, 2, 2],
            pytest.approx(100 * 10 ** (math.log(1.5) / math.log(3))),
        ),  # where it stays below
        ([4, 4, 32], [1, 8, 16], None),
    ],
)
def test_the_crossover_is_where_the_student_stays_below(student: list[float], teacher: list[float], found: Any) -> None:
    assert crossover([10, 100, 1000], student, teacher) == found
