"""The model card of a finished student: the converter's card, with what was trained and what was measured."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2r_evals import Report

NOT_YET = "It is converted, not yet finetuned."


def write_student_card(report: "Report", converted: Path, student: Path) -> None:
    """Write README.md into `student`; licence, mixers and conversion come from the card in `converted`."""
    import yaml

    from t2r_evals.report.card import card_table, model_index

    card = (converted / "README.md").read_text()
    assert NOT_YET in card, "the converter's card has changed its wording"
    trained = "; ".join(f"{stage.kind} on {stage.tokens:,} tokens" for stage in report.stages)
    measured = f"Trained: {trained}.\n\n{card_table(report)}\nThe whole report is `report.html` of the run."
    card = card.replace(NOT_YET, measured).replace(f"# {converted.name}\n", f"# {student.name}\n")
    card = card.replace(str(converted), str(student))
    head, end, rest = card.removeprefix("---\n").partition("\n---\n")
    index = yaml.safe_dump({"model-index": model_index(report, student.name)}, sort_keys=False, allow_unicode=True)
    partial = student / ".README.md.partial"
    partial.write_text(f"---\n{head}\n{index.rstrip()}{end}{rest}")
    partial.replace(student / "README.md")
