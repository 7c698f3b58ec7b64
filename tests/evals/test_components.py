"""Switching a component off: what it costs, and that a path which does nothing is flagged."""

from typing import Any

import pytest
import torch

from t2r_evals import EvaluationOptions, Report, evaluate, render_markdown
from t2r_evals.components import switched_off

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. "


def test_modules_work_again_after_the_block(model: Any) -> None:
    ids = torch.arange(40)[None]
    attention = [layer.self_attn for layer in model.model.layers]
    with torch.no_grad():
        before = model(ids).logits
        with switched_off(attention):
            without = model(ids).logits
            # Without attention no token sees another: the same token gives the same logits anywhere.
            torch.testing.assert_close(model(ids.flip(1)).logits.flip(1), without)
        after = model(ids).logits
    assert torch.equal(before, after)
    assert not torch.allclose(before, without)


def test_idle_path_is_flagged_and_a_working_one_is_not(model: Any, tokenizer: Any) -> None:
    import copy

    hybrid = copy.deepcopy(model)
    first, second = (layer.self_attn for layer in hybrid.model.layers)
    with torch.no_grad():
        first.o_proj.weight.zero_()
    result = evaluate(
        hybrid,
        tokenizer,
        name="hybrid",
        role="student",
        documents=[TEXT * 20],
        options=EvaluationOptions(windows=6, window=64, batch_size=6),
        components={"the idle layers": [first], "the other layers": [second]},
    )
    assert result.components[0].difference == pytest.approx(0, abs=1e-6)
    assert abs(result.components[1].difference) > 1e-3
    # An untrained model's attention helps no more often than not, so a path that helps is written down here.
    worked = result.components[1].model_copy(update={"difference": 0.5, "low": 0.4, "high": 0.6})
    noisy = worked.model_copy(update={"component": "the noisy layers", "low": -0.1})
    shown = result.model_copy(update={"components": [result.components[0], worked, noisy]})
    text = render_markdown(Report(title="t", created="now", results=[shown], comparisons=[], worst=[]))
    assert "Warning: without the idle layers" in text
    assert "Warning: without the noisy layers" in text
    assert "Warning: without the other layers" not in text
