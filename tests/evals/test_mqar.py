"""MQAR: what an example holds, and that training finds it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from t2r_evals.mqar import Examples, MqarOptions, accuracy, best_results, draw, make_examples, sweep, train

SMALL = MqarOptions(
    vocabulary=32, length=16, pairs=3, train_examples=2048, test_examples=256, epochs=12, batch_size=64, enough=0.95
)


class LookUp(torch.nn.Module):
    """Reads the pairs off the sequence, as a perfect memory would."""

    def __init__(self, options: MqarOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, ids: torch.Tensor) -> object:
        pairs = ids[:, : 2 * self.options.pairs].view(len(ids), -1, 2)
        hits = ids[:, :, None] == pairs[:, None, :, 0]
        logits = torch.zeros(*ids.shape, self.options.vocabulary)
        logits.scatter_add_(2, pairs[:, None, :, 1].expand(-1, ids.shape[1], -1), hits.float())
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("random_filler", [True, False])
def test_examples_are_as_the_paper_has_them(random_filler: bool) -> None:
    options = MqarOptions(vocabulary=64, length=40, pairs=5, random_filler=random_filler)
    ids, positions, answers = make_examples(5000, options, seed=0)  # more than are made at a time
    keys, values = ids[:, 0:10:2], ids[:, 1:10:2]
    assert (int(keys.min()), int(keys.max())) == (1, 31)
    assert (int(values.min()), int(values.max())) == (32, 63)
    for distinct in (keys, values, positions):
        assert (distinct.sort(1).values.diff(dim=1) > 0).all()
    assert int(positions.min()) == 10
    assert int(positions.max()) <= 38
    assert (positions % 2 == 0).all()
    assert torch.equal(ids.gather(1, positions), keys)
    assert torch.equal(answers, values)
    if not random_filler:
        assert int(ids[:, 10:].count_nonzero()) == positions.numel()
    assert torch.equal(ids, make_examples(5000, options, seed=0).ids)
    assert not torch.equal(ids, make_examples(5000, options, seed=1).ids)


def test_places_are_drawn_one_by_one_with_the_weights_of_the_definition() -> None:
    """Against the definition: weights i^(a-1), the places already taken left out, the rest in proportion."""
    options = MqarOptions(vocabulary=16, length=14, pairs=2, power=0.5)
    places = ((make_examples(40_000, options, seed=0).positions - 4) // 2).tolist()
    weights = [i**-0.5 for i in range(1, 6)]
    for first in range(5):
        for second in range(5):
            expected = 0.0
            if first != second:
                expected = weights[first] / sum(weights) * weights[second] / (sum(weights) - weights[first])
            found = places.count([first, second]) / len(places)
            assert found == pytest.approx(expected, abs=5 * (expected / len(places)) ** 0.5)


def test_perfect_memory_scores_one_and_none_scores_chance() -> None:
    examples = make_examples(300, SMALL, seed=3)
    assert accuracy(LookUp(SMALL), examples, 64) == 1
    blind = examples.ids.clone()
    blind[:, 1:6:2] = 16
    assert accuracy(LookUp(SMALL), Examples(blind, examples.positions, examples.answers), 64) < 0.2


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": 200},
        {"vocabulary": 8, "pairs": 4, "length": 64},
        {"train_examples": 8, "batch_size": 9},
        {"curriculum": ((8, 4),)},
        {"curriculum": ((1024, 4),)},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"pairs|batch_size|curriculum"):
        MqarOptions(**change)


def softmax(mixer: str, width: int) -> torch.nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=None,
        tie_word_embeddings=True,
    )
    return MistralForCausalLM(config)


def test_attention_learns_it_and_the_sweep_keeps_the_best() -> None:
    torch.manual_seed(0)
    results = list(sweep(softmax, ["softmax"], [64], SMALL, learning_rates=(1e-6, 3e-3)))
    assert results[0].lr == 3e-3
    assert results[0].accuracy > 0.9
    assert best_results(results) == results[:1]
    assert "accuracy, %" in draw(results, SMALL)
    poor = train(softmax("softmax", 64), SMALL.model_copy(update={"epochs": 1}), 1e-6)
    assert poor.accuracy < 0.3


@pytest.mark.parametrize(("mixer", "rate"), [("softmax", 3e-3), ("gsa:style=paper,slots=16", 7e-3)])
def test_with_a_short_convolution_64_tokens_and_8_pairs_are_learned(mixer: str, rate: float) -> None:
    """Guessing among the 8 values that were seen gives 0.125, where training rests for a while."""
    from t2r.cli.bench_mqar import build

    shape = {"vocabulary": 256, "length": 64, "pairs": 8}
    amount = {"batch_size": 32, "train_examples": 3200, "test_examples": 256, "epochs": 12, "warmup": 50}
    options = MqarOptions(**shape, **amount, enough=0.5)  # type: ignore[arg-type]
    torch.manual_seed(0)
    result = train(build(mixer, 64, 256, 64, short_conv=4), options, rate)
    assert result.accuracy > 0.5


def test_a_curriculum_is_gone_through_lesson_by_lesson() -> None:
    """Each until it is learned or patience ends; every step has as many tokens; the accuracy is the setting's own."""
    options = MqarOptions(
        vocabulary=32,
        length=32,
        pairs=6,
        train_examples=512,
        test_examples=64,
        epochs=12,
        batch_size=16,
        curriculum=((8, 1), (16, 2)),
        patience=2,
    )
    assert [lesson.batch_size for lesson in options.lessons()] == [64, 32, 16]
    torch.manual_seed(0)
    model = softmax("softmax", 32)
    stuck = train(model, options, 0.0)
    assert [(epoch.length, epoch.pairs) for epoch in stuck.curve] == [(8, 1)] * 2 + [(16, 2)] * 2 + [(32, 6)] * 8
    assert stuck.accuracy == stuck.curve[-1].accuracy
    eager = train(model, options.model_copy(update={"learned": 0.0, "epochs": 2}), 0.0)
    assert [epoch.pairs for epoch in eager.curve] == [1, 2]
    assert eager.accuracy == stuck.accuracy
    weights = [p.clone() for p in model.parameters()]
    hasty = train(model, options.model_copy(update={"minutes": 1e-9}), 1.0)
    assert len(hasty.curve) == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))


def test_the_convolution_is_causal_and_trained_with_the_model() -> None:
    from t2r.cli.bench_mqar import build

    model = build("softmax", 16, 32, 16, short_conv=3)
    (first, _) = (layer.short_conv for layer in model.model.layers)
    x = torch.randn(2, 9, 16)
    expected = x + first.weight[0] * x
    expected[:, 1:] += first.weight[1] * x[:, :-1]
    expected[:, 2:] += first.weight[2] * x[:, :-2]
    torch.testing.assert_close(first(x), expected)
    ids = torch.arange(12)[None]
    logits = model(ids).logits
    ids[0, 8] = 30
    changed = (model(ids).logits - logits).abs().amax(-1)[0]
    assert changed[:8].max() == 0
    assert changed[8:].min() > 0
    model(ids, labels=ids).loss.backward()
    assert all(layer.short_conv.weight.grad.abs().min() > 0 for layer in model.model.layers)


def test_command_writes_table_and_figure(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from t2r.cli.bench_mqar import command

    small = "--widths 16 --lr 1e-3 --short-conv 4 --length 16 --pairs 2 --vocabulary 16"
    small += " --examples 64 --epochs 2 --batch-size 32 --heads 2 --curriculum 8:1"
    mixers = "softmax gsa:style=paper,slots=8"
    arguments = ["--output", str(tmp_path / "out"), "--mixers", mixers, *f"{small} --device cpu --jobs 2".split()]
    run = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    table, trials = (tmp_path / "out" / "mqar.md").read_text().split("\n\n")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == mixers.split()
    assert len(trials.splitlines()) == 2 + 2
    record = json.loads((tmp_path / "out" / "mqar.json").read_text())
    assert [r["mixer"] for r in record["results"]] == [r["mixer"] for r in record["best"]] == mixers.split()
    assert record["options"]["heads"] == 2
    assert all("<svg" in (tmp_path / "out" / name).read_text() for name in ("mqar.svg", "curves.svg"))
    refused = CliRunner().invoke(command, [*arguments[:3], "softmax gsa:slotz=8", *arguments[4:]])
    assert "slots" in str(refused.exception)
    refused = CliRunner().invoke(command, [*arguments, "--curriculum", "8"])
    assert "length:pairs" in str(refused.exception)
