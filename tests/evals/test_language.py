"""The language protocol against a loop written by hand, and the definition of a far repeat."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from t2r_evals import InputError, language

TEXT = "It was the best of times, it was the worst of times; Zürich — naïve. "


def by_hand(model: Any, tokenizer: Any, documents: list[str], windows: int, window: int) -> list[list[float]]:
    """Losses [windows][window], one window and one position at a time, in float64."""
    ids = []
    for document in documents:
        ids += [tokenizer.bos_token_id, *tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
    losses = []
    for first in range(0, windows * window, window):
        with torch.no_grad():
            logits = model(torch.tensor([ids[first : first + window]])).logits[0].double()
        row = []
        for position in range(window):
            target = ids[first + position + 1]
            row.append(float(torch.logsumexp(logits[position], 0) - logits[position, target]))
        losses.append(row)
    return losses


def test_protocol_equals_a_loop_written_by_hand(model: Any, tokenizer: Any) -> None:
    documents = [TEXT * 3, TEXT[::-1] * 2, TEXT * 4]
    expected = np.array(by_hand(model, tokenizer, documents, 5, 64))
    result = language.measure(model, tokenizer, documents, windows=5, window=64, batch_size=2)
    assert result.tokens == 5 * 64
    assert result.loss == pytest.approx(expected.mean(), rel=1e-5)
    assert result.window_losses == pytest.approx(expected.mean(axis=1).tolist(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-4)
    buckets = [(b.start, b.end) for b in result.loss_by_position]
    assert buckets == [(0, 16), (16, 32), (32, 64)]
    for bucket in result.loss_by_position:
        assert bucket.loss == pytest.approx(expected[:, bucket.start : bucket.end].mean(), rel=1e-5)


def test_batch_size_never_changes_a_result(model: Any, tokenizer: Any) -> None:
    documents = [TEXT * 10]
    one, many = (
        language.measure(model, tokenizer, documents, windows=6, window=50, batch_size=size) for size in (1, 4)
    )
    assert many.window_losses == pytest.approx(one.window_losses, abs=1e-5)


def test_bytes_are_those_of_the_scored_text(tokenizer: Any) -> None:
    stream = language.token_stream(tokenizer, [TEXT, "é" * 7, ""])
    assert stream.bytes.sum() == len((TEXT + "é" * 7).encode())
    specials = np.isin(stream.ids, [tokenizer.bos_token_id, tokenizer.eos_token_id])
    assert specials.sum() == 6
    assert stream.bytes[specials].sum() == 0


def test_bits_per_byte_of_a_uniform_model(model: Any, tokenizer: Any) -> None:
    class Uniform:
        device = torch.device("cpu")

        def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, len(tokenizer))})

    result = language.measure(Uniform(), tokenizer, ["a" * 1000], windows=2, window=100, batch_size=1)
    assert result.loss == pytest.approx(math.log(len(tokenizer)))
    # Ascii through a byte-level tokenizer without merges is one token per byte.
    assert result.bits_per_byte == pytest.approx(math.log2(len(tokenizer)))


def test_far_repeats_on_a_crafted_sequence() -> None:
    tokens = np.array([4000 + i for i in range(200)])
    tokens[[0, 1]] = [500, 501]  # bigram (500, 501): far again at 140, then near at 150
    tokens[[140, 141]] = [500, 501]
    tokens[[150, 151]] = [500, 501]
    tokens[[2, 3]] = [600, 7]  # far again, but the target id is small
    tokens[[160, 161]] = [600, 7]
    tokens[[5, 6]] = [800, 300]  # and here it is the last of the small ones
    tokens[[170, 171]] = [800, 300]
    tokens[[20, 21]] = [700, 701]  # exactly 128 positions apart is not far
    tokens[[148, 149]] = [700, 701]
    found = language.far_repeats(tokens[:-1], tokens[1:], gap=128, min_id=300)
    assert np.flatnonzero(found).tolist() == [140]


def test_kl_to_itself_is_zero_and_to_another_is_not(model: Any, tokenizer: Any) -> None:
    same = language.measure(model, tokenizer, [TEXT * 5], windows=2, window=64, batch_size=2, teacher=model)
    assert same.kl_to_teacher == pytest.approx(0, abs=1e-7)
    assert same.top1_agreement == 1
    torch.manual_seed(1)
    other = type(model)(model.config).eval()
    different = language.measure(model, tokenizer, [TEXT * 5], windows=2, window=64, batch_size=2, teacher=other)
    assert different.kl_to_teacher is not None
    assert different.kl_to_teacher > 0.1


class Constant:
    """The same distribution everywhere."""

    device = torch.device("cpu")

    def __init__(self, probabilities: list[float]) -> None:
        self.logits = torch.tensor(probabilities).log()

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


def test_kl_is_the_teachers_to_the_model(tokenizer: Any) -> None:
    rest = [0.0] * (len(tokenizer) - 2)
    model, teacher = Constant([0.25, 0.75, *rest]), Constant([0.6, 0.4, *rest])
    model.logits, teacher.logits = (x.clamp(min=-50) for x in (model.logits, teacher.logits))
    result = language.measure(model, tokenizer, [TEXT], windows=1, window=32, batch_size=1, teacher=teacher)
    assert result.kl_to_teacher == pytest.approx(0.6 * math.log(0.6 / 0.25) + 0.4 * math.log(0.4 / 0.75), rel=1e-5)
    assert result.top1_agreement == 0


def test_too_little_text_is_one_clear_line(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"1 windows of 64; windows=9 needs 577"):
        language.measure(model, tokenizer, [TEXT], windows=9, window=64, batch_size=1)


def test_position_edges_cover_the_window() -> None:
    assert language.position_edges(10) == [0, 10]
    assert language.position_edges(256) == [0, 16, 32, 64, 96, 128, 192, 256]


@pytest.mark.slow
def test_published_figures_of_the_shared_teacher(shared: Path) -> None:
    """The first windows of the protocol whose 48 windows gave 2.7140 and 1.9079 in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "teacher-27m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    documents = (shared / "data" / "val.txt").read_bytes().decode().split("\n\0\n")
    result = language.measure(model, tokenizer, documents, windows=3, window=2048, batch_size=1)
    assert result.window_losses == pytest.approx([2.95544, 2.82618, 0.76901], abs=2e-4)
