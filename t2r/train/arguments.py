"""A stage's options as transformers' TrainingArguments."""

import importlib.util
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TrainingArguments

from t2r.errors import InputError
from t2r.recipe import Recipe, Stage

logger = logging.getLogger(__name__)


def processes() -> PartialState:
    """torchrun's processes, or this one alone."""
    # Not torch's ten minutes: the others wait while one downloads a teacher, places its slots and converts it.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=3))


def check_stage(recipe: Recipe, stage: Stage) -> None:
    """Whether a stage can run here.

    Raises:
        InputError: a tracker that is not installed, a batch that the processes cannot share evenly, or FSDP with an
            adapter.
    """
    _trackers(recipe)
    number = processes().num_processes
    rows = stage.batch_tokens // stage.sequence_length
    if rows % (stage.micro_batch_size * number):
        raise InputError(
            f"stages: {stage.kind}: batch_tokens / sequence_length = {rows} rows cannot be shared by {number} "
            f"processes of micro_batch_size {stage.micro_batch_size}"
        )
    if _is_sharded(recipe) and stage.adapter is not None:
        raise InputError("distributed.fsdp: not together with an adapter; leave fsdp out (DDP) for that stage's run")


def training_arguments(recipe: Recipe, stage: Stage, folder: Path) -> TrainingArguments:
    """The arguments of one stage.

    Args:
        folder: of the stage; checkpoints and TensorBoard's files go there.

    Raises:
        InputError: as `check_stage`.
    """
    check_stage(recipe, stage)
    trackers = _trackers(recipe)
    if "tensorboard" in trackers:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    if "wandb" in trackers:
        os.environ.setdefault("WANDB_PROJECT", recipe.log.project)
    rows = stage.batch_tokens // stage.sequence_length
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.micro_batch_size,
        gradient_accumulation_steps=rows // (stage.micro_batch_size * processes().num_processes),
        learning_rate=stage.lr.mixer,
        adam_beta1=stage.betas[0],
        adam_beta2=stage.betas[1],
        max_grad_norm=stage.clip or 0.0,
        bf16=False,  # precision is the trainer's own autocast
        use_cpu=not torch.accelerator.is_available(),
        seed=recipe.seed,
        logging_steps=stage.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",  # saving and evaluating are decided between steps, by our own callback
        eval_strategy="no",
        ignore_data_skip=True,  # the stream of rows resumes by itself
        remove_unused_columns=False,
        include_num_input_tokens_seen="no",
        use_cache=True,  # what the saved configuration says; training passes use_cache=False
        disable_tqdm=True,
        report_to=trackers or ["none"],
        ddp_find_unused_parameters=False,
        run_name=f"{Path(recipe.output).name}-{folder.name}",
        project=recipe.log.project,
        **_sharding(recipe),
    )
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible and one is used; start with torchrun to use more.", args.n_gpu)
        args._n_gpu = 1  # else the Trainer wraps the model in nn.DataParallel
    return args


def _trackers(recipe: Recipe) -> list[str]:
    asked = [name for name in ("tensorboard", "wandb", "trackio") if getattr(recipe.log, name)]
    for name in asked:
        if importlib.util.find_spec(name) is None:
            raise InputError(f"log.{name}: the package {name} is not installed; pip install 't2r[trackers]'")
    return asked


def _is_sharded(recipe: Recipe) -> bool:
    return recipe.distributed.fsdp and processes().num_processes > 1


def _sharding(recipe: Recipe) -> dict[str, Any]:
    if not _is_sharded(recipe):
        return {}
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2},
        # Else the gradients of a step's micro-batches are summed up unsharded, as large as the model.
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}},
    }
