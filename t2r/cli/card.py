"""What was measured, added to the model card of a finished student."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2r_evals import Report

_HEADING = "\n## Measured\n"


def add_measurements(report: "Report", student: Path) -> None:
    """Put the short table and the front matter's `model-index` on the card in `student`, in the place of older ones.

    The card is in the folder's manifest, which is written anew; nothing else is hashed again.
    """
    import yaml

    from t2r.publish import MANIFEST, write_manifest
    from t2r_evals.report.card import card_table, model_index

    card = student / "README.md"
    match = re.fullmatch(r"(?:---\n(.*?)\n---\n)?(.*)", card.read_text(), flags=re.DOTALL)
    assert match is not None
    front = yaml.safe_load(match[1] or "{}") | {"model-index": model_index(report, student.name)}
    body = match[2].partition(_HEADING)[0].rstrip()
    table = f"{card_table(report)}\nThe whole report, with teacher and controls, is `report.html` of the run."
    text = f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}\n{_HEADING}\n{table}\n"
    if text == card.read_text():
        return
    files = json.loads((student / MANIFEST).read_text())["files"]
    partial = student.parent / f".{student.name}.README.partial"
    partial.write_text(text)
    partial.replace(card)
    write_manifest(student, {name: file["sha256"] for name, file in files.items() if name != card.name})
