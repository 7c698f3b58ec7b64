"""What training leaves behind: a student as a folder that loads, with its card, its recipe and its history."""

import json
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2r.publish import CONFIG, MANIFEST, publish, sha256_file, verify_manifest, write_whole
from t2r.recipe import Recipe, StageFolder, dump
from t2r.train.trainer import save_weights

CARD = "README.md"
ORIGIN = "origin.json"


def publish_student(
    model: Any,
    before: Path,
    destination: Path,
    *,
    recipe: Recipe,
    stages: list[StageFolder],
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Publish a student beside the tokenizer and licence files of the folder it came from.

    Args:
        before: the folder the training started from.
        stages: the stages this student went through, first to last; their summaries are on the card.
        state_dict: the weights, where the model itself does not hold them whole (FSDP).
    """
    with publish(destination, overwrite=True) as staging:
        save_weights(model, staging, state_dict)
        for path in before.iterdir():
            weights = path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json")
            if path.is_file() and not weights and path.name not in (CONFIG, MANIFEST, CARD):
                shutil.copyfile(path, staging / path.name)
        (staging / ORIGIN).write_text(json.dumps(_origin(before)) + "\n")
        (staging / "recipe.yaml").write_text(dump(recipe))
        (staging / CARD).write_text(_card(before, destination, recipe, stages))


def is_current(student: Path, before: Path) -> bool:
    """True when `student` verifies and was published from `before` as `before` is now."""
    if not (before / MANIFEST).is_file() or verify_manifest(student):
        return False
    origin = student / ORIGIN
    return origin.is_file() and json.loads(origin.read_text()) == _origin(before)


def _origin(before: Path) -> dict[str, str]:
    return {"manifest_sha256": sha256_file(before / MANIFEST)}


def write_summary(place: StageFolder, summary: dict[str, Any]) -> None:
    """stage.json, written whole or not at all."""
    write_whole(place.summary, json.dumps(summary, indent=1) + "\n")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " CPU"


def _card(before: Path, destination: Path, recipe: Recipe, stages: list[StageFolder]) -> str:
    source = before / CARD
    # The converter's own card, whose front matter carries the teacher's licence.
    found = re.match(r"---\n.*?\n---\n", source.read_text(), flags=re.DOTALL) if source.is_file() else None
    rows = []
    for place, stage in zip(stages, recipe.stages, strict=False):
        summary = json.loads(place.summary.read_text())
        adapter = f", LoRA r {stage.adapter.r} (merged)" if stage.adapter else ""
        rows.append(
            f"| {place.path.name}{adapter} | {summary['tokens']:,} | {summary['steps']:,} | {stage.sequence_length:,} "
            f"| {summary['seconds']:,.0f} | {summary['processes']} x {summary['device']} |"
        )
    lines = [
        f"# {Path(recipe.output).name}: {destination.name}",
        "",
        f"A student of `{recipe.model.source}`: its attention replaced by {', '.join(m.name for m in recipe.mixer)}, "
        "then trained by t2r. `conversion.json` accounts for every converted tensor, `recipe.yaml` is the whole run, "
        "`manifest.json` holds the SHA-256 sum of every file.",
        "",
        "| stage | tokens | steps | sequence | seconds | on |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Load it with:",
        "",
        "    import t2r",
        "    from transformers import AutoModelForCausalLM",
        f"    model = AutoModelForCausalLM.from_pretrained({str(destination)!r})",
    ]
    return (found[0] + "\n" if found else "") + "\n".join(lines) + "\n"
