"""What a speed measurement reports can be checked where it is arithmetic: tokens, bytes, and that time passes."""

from typing import Any

from t2r_evals.speed import measure_speed


def test_cache_bytes_are_those_of_the_architecture(model: Any) -> None:
    points = measure_speed(model, [8, 32], decode_tokens=4, repeats=1)
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


def test_larger_batches_are_measured_beside_batch_one(model: Any) -> None:
    points = measure_speed(model, [8], decode_tokens=2, largest_batch=4, repeats=1)
    assert [p.batch for p in points] == [1, 4]
    assert points[1].state_bytes == 4 * points[0].state_bytes
