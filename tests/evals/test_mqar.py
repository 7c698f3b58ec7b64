"""MQAR: what an example holds, and that training finds it."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from t2r_evals.mqar import IGNORED, MqarOptions, accuracy, draw, make_examples, sweep, train

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
    inputs, labels = make_examples(500, options, seed=0)
    keys, values = inputs[:, 0:10:2], inputs[:, 1:10:2]
    assert keys.min() >= 1
    assert keys.max() <= 31
    assert values.min() >= 32
    assert values.max() <= 63
    assert all(len(set(row.tolist())) == 5 for row in torch.cat([keys, values]))
    asked = labels != IGNORED
    assert (asked.sum(1) == 5).all()
    positions = asked.nonzero()[:, 1]
    assert positions.min() >= 10
    assert (positions % 2 == 0).all()
    for row in range(20):
        known = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        assert {known[int(k)] for k in inputs[row][asked[row]]} == set(known.values())
        assert all(
            known[int(k)] == int(v) for k, v in zip(inputs[row][asked[row]], labels[row][asked[row]], strict=True)
        )
    if not random_filler:
        assert (inputs[:, 10:][~asked[:, 10:]] == 0).all()
    # Weight i^(a-1): the first slot asks far more often than the last.
    assert asked[:, 10].float().mean() > 3 * asked[:, 38].float().mean()
    again = make_examples(500, options, seed=0)
    assert torch.equal(inputs, again[0])
    assert not torch.equal(inputs, make_examples(500, options, seed=1)[0])


def test_perfect_memory_scores_one_and_none_scores_chance() -> None:
    examples = make_examples(300, SMALL.model_copy(update={"random_filler": False}), seed=3)
    assert accuracy(LookUp(SMALL), examples, 64) == 1
    blind = examples[0].clone()
    blind[:, 1:6:2] = 16
    assert accuracy(LookUp(SMALL), (blind, examples[1]), 64) < 0.2


@pytest.mark.parametrize("change", [{"pairs": 200}, {"vocabulary": 8, "pairs": 4, "length": 64}])
def test_impossible_settings_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(ValidationError, match="pairs"):
        MqarOptions(**change)  # type: ignore[arg-type]


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
    results = sweep(softmax, ["softmax"], [64], SMALL, learning_rates=(1e-6, 3e-3))
    assert [r.lr for r in results] == [3e-3]
    assert results[0].accuracy > 0.9
    assert "accuracy, %" in draw(results, SMALL)
    poor = train(softmax("softmax", 64), SMALL.model_copy(update={"epochs": 1}), 1e-6)
    assert poor.accuracy < 0.3


def test_command_writes_table_and_figure(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from t2r.cli.bench_mqar import command

    small = "--widths 16 --lr 1e-3 --length 16 --pairs 2 --vocabulary 16 --examples 64 --epochs 1 --batch-size 32"
    mixers = "softmax gsa:style=paper,slots=8"
    arguments = ["--output", str(tmp_path / "out"), "--mixers", mixers, *small.split(), "--device", "cpu"]
    run = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert run.exit_code == 0
    table = (tmp_path / "out" / "mqar.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == mixers.split()
    record = json.loads((tmp_path / "out" / "mqar.json").read_text())
    assert [r["mixer"] for r in record["results"]] == mixers.split()
    assert "<svg" in (tmp_path / "out" / "mqar.svg").read_text()
    refused = CliRunner().invoke(command, [*arguments[:3], "softmax gsa:slotz=8", *arguments[4:]])
    assert "slots" in str(refused.exception)
