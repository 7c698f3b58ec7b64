"""Checkpoints of a stage: complete or not there, named by step, found by verifying."""

import logging
import re
import shutil
from pathlib import Path

from t2r.errors import InputError
from t2r.publish import verify_manifest

logger = logging.getLogger(__name__)

DATA = "data.json"
WEIGHTS = "weights"
STATE = "trainer_state.json"
_NAME = re.compile(r"step-(\d{8})")
_NEEDED = (
    ("data state", DATA),
    ("weights and optimizer state", WEIGHTS),
    ("trainer state", STATE),
    ("scheduler", "scheduler.pt"),
)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    if not match:
        raise InputError(f"{checkpoint}: not a checkpoint (step-00000100, for example)")
    return int(match[1])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder by step, oldest first, whether they verify or not."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())


def problems(checkpoint: Path) -> list[str]:
    """Why a checkpoint cannot be resumed from; empty when it can."""
    found = verify_manifest(checkpoint)
    if found:
        return found
    names = {path.relative_to(checkpoint).parts[0] for path in checkpoint.rglob("*") if path.is_file()}
    found = [f"{checkpoint}: no {what} ({name})" for what, name in _NEEDED if name not in names]
    if not any(name.startswith("rng_state") for name in names):
        found.append(f"{checkpoint}: no random state")
    return found


def newest_verified(folder: Path) -> Path | None:
    """The newest checkpoint that verifies, None when there is none. Tells when it steps over broken ones."""
    for checkpoint in reversed(list_checkpoints(folder)):
        why = problems(checkpoint)
        if not why:
            return checkpoint
        logger.warning("%s does not verify (%s); stepping back to the one before.", checkpoint.name, why[0])
    return None


def rotate(folder: Path, keep: int, published: Path) -> None:
    """Remove all but the newest `keep` checkpoints, by step; never `published`, the one just written and verified."""
    for checkpoint in list_checkpoints(folder)[:-keep]:
        if checkpoint != published:
            _remove(checkpoint)


def remove_after(folder: Path, step: int) -> None:
    """Remove checkpoints later than `step`, and what killed saves left."""
    for partial in folder.glob(".step-*.partial-*"):
        shutil.rmtree(partial, ignore_errors=True)
    for checkpoint in list_checkpoints(folder):
        if step_of(checkpoint) > step:
            logger.warning("Removing %s: the run goes on from step %d.", checkpoint, step)
            _remove(checkpoint)


def _remove(checkpoint: Path) -> None:
    # Out of the way first: a kill while the tree is being removed must not leave half a checkpoint under its name.
    doomed = checkpoint.with_name(f".{checkpoint.name}.partial-removed")
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
