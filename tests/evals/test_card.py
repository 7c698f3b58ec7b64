"""The model card's table and front matter."""

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from t2r_evals import schema
from t2r_evals.report.card import card_table, model_index


def test_front_matter_reads_back_as_eval_results(report: schema.Report) -> None:
    index = yaml.safe_load(yaml.safe_dump(model_index(report, "my-model")))
    name, results = model_index_to_eval_results(index)
    assert name == "my-model"
    scores = {(r.dataset_type, r.metric_type): r.metric_value for r in results}
    assert scores["arc_easy", "acc"] == 0.7
    student = report.results[1]
    assert student.language is not None
    assert scores["held-out-text", "loss"] == round(student.language.loss, 4)
    assert "model-index" in ModelCardData(model_name="my-model", eval_results=results).to_dict()


def test_table_puts_the_student_beside_the_teacher(report: schema.Report) -> None:
    assert "| arc_easy, acc, 0-shot | 70.0 | 75.0 |" in card_table(report)
    assert "| loss on held-out text, nats per token | 2.892 | 2.722 |" in card_table(report)
