"""A training stage as a report shows it, read from the folder that the trainer wrote."""

import json
from pathlib import Path

from t2r_evals.errors import InputError
from t2r_evals.schema import CurvePoint, Stage

_LOSS_NAMES = {"align": "align loss", "distill": "distill loss", "finetune": "cross-entropy, nats per token"}


def read_stage(folder: Path) -> Stage:
    """The stage in `folder`: stage.json (the summary) and log.jsonl (a line per logged step; unknown keys are skipped).

    Raises:
        InputError: a file is missing or cannot be read.
    """
    folder = Path(folder)
    try:
        summary = json.loads((folder / "stage.json").read_text(encoding="utf-8"))
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        points = [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a finished stage ({error})") from None
    known = CurvePoint.model_fields
    return Stage(
        name=folder.name,
        kind=summary["kind"],
        tokens=summary["tokens"],
        steps=summary["steps"],
        seconds=summary["seconds"],
        tokens_per_second=summary.get("tokens_per_second"),
        device=summary.get("device"),
        loss_name=_LOSS_NAMES.get(summary["kind"], "loss"),
        curve=[
            CurvePoint(**{k: v for k, v in p.items() if k in known}) for p in points if "step" in p and "tokens" in p
        ],
    )
