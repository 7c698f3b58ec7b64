"""Made-up look-up tasks: what an item holds, and how an answer is scored."""

from typing import Any

import pytest
import torch

from t2r_evals import EvaluationOptions, InputError, Report, evaluate, render_html
from t2r_evals.synthetic import DEPTHS, TASKS, make_items, run_synthetic


class Oracle:
    """Knows the text that it reads, one token ahead; always wrong when asked to be."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int, wrong: bool) -> None:
        self.vocabulary, self.wrong = vocabulary, wrong

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
        following = input_ids.roll(-1, dims=1) + (1 if self.wrong else 0)
        logits = 20.0 * torch.nn.functional.one_hot(following % self.vocabulary, self.vocabulary).float()
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


@pytest.mark.parametrize("length", [200, 333])
def test_items_fit_their_length_and_hold_the_answer_at_their_depth(tokenizer: Any, length: int) -> None:
    for item in make_items(tokenizer, length, items=2, seed=0):
        tokens = len(tokenizer(item.prompt + item.answer)["input_ids"]) + 1
        assert length * 0.7 < tokens <= length
        if item.task == "copy":
            assert item.prompt.strip() == item.answer
            continue
        question = item.prompt[max(item.prompt.rfind("\n"), item.prompt.rfind(".")) + 1 :].strip()
        assert item.prompt.count(question) == 2  # stated once, asked once
        stated = item.prompt.index(question)
        assert item.prompt[stated + len(question) :].startswith(item.answer)
        assert item.depth is not None
        assert abs(stated / item.prompt.rindex(question) - item.depth) < 0.3
    assert make_items(tokenizer, length, 2, 0) == make_items(tokenizer, length, 2, 0)
    assert make_items(tokenizer, length, 2, 0) != make_items(tokenizer, length, 2, 1)


def test_an_oracle_is_right_and_a_wrong_one_is_not(tokenizer: Any) -> None:
    for wrong in (False, True):
        oracle = Oracle(len(tokenizer), wrong)
        results, points, rows = run_synthetic(oracle, tokenizer, lengths=[150, 300], items=2, batch_size=3)
        assert {r.metrics["acc"].value for r in results.values()} == {0.0 if wrong else 1.0}
        assert all((r.metrics["answer_loss"].value > 1) == wrong for r in results.values())
        assert len(points) == 2 * (3 * len(DEPTHS) + 1)
        assert len(rows) == 2 * sum(r.documents for r in results.values())


def test_an_answer_is_right_when_all_of_its_tokens_are(tokenizer: Any) -> None:
    class Stumbling(Oracle):
        """Wrong about every 8: some numbers hold one, most characters are none."""

        def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
            output = super().__call__(input_ids, logits_to_keep)
            missed = input_ids.roll(-1, dims=1)[:, -logits_to_keep:] == eight
            output.logits[missed] = 0
            output.logits[missed, 0] = 20.0
            return output

    (eight,) = tokenizer("8", add_special_tokens=False)["input_ids"]
    oracle = Stumbling(len(tokenizer), wrong=False)
    results, _, rows = run_synthetic(oracle, tokenizer, lengths=[150], items=4, batch_size=3)
    assert results["copy"].metrics["acc"].value == 1.0
    found = [row for row in rows if row["metric"] == "acc" and row["task"] != "copy"]
    assert {row["value"] for row in found} == {0.0, 1.0}
    assert all(row["value"] == ("8" not in row["target"]) for row in found)


def test_batch_size_never_changes_a_result(model: Any, tokenizer: Any) -> None:
    losses = []
    for size in (1, 5):
        _, _, rows = run_synthetic(model, tokenizer, lengths=[180, 240], items=1, batch_size=size)
        losses.append([row["value"] for row in rows if row["metric"] == "answer_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_too_short_a_length_is_one_line(model: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="10 tokens are too few"):
        run_synthetic(model, tokenizer, lengths=[10], items=1, batch_size=1)


def test_suite_reaches_the_report_as_tasks_and_maps(model: Any, tokenizer: Any) -> None:
    options = EvaluationOptions(suites=("synthetic",), recall_lengths=(180, 256), recall_items=1, batch_size=8)
    results = [
        evaluate(model, tokenizer, name="one", role="teacher", documents=None, options=options),
        evaluate(model, tokenizer, name="two", role="student", documents=None, options=options),
    ]
    assert set(results[0].tasks) == set(TASKS)
    page = render_html(Report(title="t", created="now", results=results, comparisons=[], worst=[]))
    assert "phonebook, two: accuracy by length and depth" in page
