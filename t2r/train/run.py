"""Carry out the stages of a recipe: each loads the model before it, trains, and publishes its own."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments, set_seed

from t2r.errors import InputError
from t2r.model import load, load_tokenizer
from t2r.publish import CONFIG, publish
from t2r.recipe import FinetuneStage, Recipe, RunFolder, Stage, StageFolder
from t2r.resources import resolve
from t2r.train import checkpoints
from t2r.train.arguments import check_stage, processes, training_arguments
from t2r.train.documents import Source, open_source, read_documents
from t2r.train.fused import fuse
from t2r.train.objectives import make_objective
from t2r.train.outputs import device_name, is_current, publish_student, write_summary
from t2r.train.packing import Batches, Loader, PackedRows, State, validation_windows
from t2r.train.parameters import make_trainable
from t2r.train.progress import ProgressCallback
from t2r.train.signals import StopSignal
from t2r.train.trainer import StageTrainer, save_weights
from t2r.versions import versions

logger = logging.getLogger(__name__)

Resume = Literal["auto", "never"] | Path


def finetune(recipe: Recipe, *, resume: Resume | str = "auto") -> Path:
    """Train the converted student of a run by all stages of its recipe.

    Finished stages are kept. `folder.converted` must exist. Under torchrun every process calls this.

    Args:
        resume: auto: go on from the newest checkpoint that verifies; never: start again, removing the stages' outputs;
            a path: go on from that checkpoint, removing later ones.

    Returns:
        The folder of the final student.

    Raises:
        InputError: no converted student, bad data, or a checkpoint that does not verify.
        NonFiniteError: a loss or gradient was NaN or infinite.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM, when the checkpoint is written.
    """
    folder = RunFolder(recipe)
    if not (folder.converted / CONFIG).is_file():
        raise InputError(f"{folder.converted}: no converted student there; `t2r finetune` and `t2r run` convert first")
    for stage, place in zip(recipe.stages, folder.stages, strict=True):
        if not place.model.exists():
            check_stage(recipe, stage)  # the last one too, before hours of the first
    state = processes()
    if not state.is_main_process:
        logging.getLogger("t2r").setLevel(logging.ERROR)  # one process tells
    if state.is_main_process:
        folder.claim()
        _reset(folder, resume)
    state.wait_for_everyone()
    source = open_source(recipe.data)
    validation = read_documents(recipe.data.validation) if recipe.data.validation else []
    if validation:  # enough for the longest rows, which may come last
        longest = max(stage.sequence_length for stage in recipe.stages)
        validation_windows(validation, load_tokenizer(folder.converted), length=longest, count=1)
    before, data_state, teacher = folder.converted, None, None
    with StopSignal() as stop:
        for stage, place in zip(recipe.stages, folder.stages, strict=True):
            if not place.done:
                args = training_arguments(recipe, stage, place.path)
                if isinstance(stage, FinetuneStage):
                    teacher = None
                elif teacher is None:
                    teacher = _load_teacher(recipe, args)
                if teacher is not None and stage.fused:
                    fuse(teacher, args.device)
                run = _StageRun(recipe, stage, place, args, stop)
                run.train(before, teacher, source, data_state, validation)
                state.wait_for_everyone()
                stop.end()
            before, data_state = place.model, json.loads(place.summary.read_text())["data_state"]
    if state.is_main_process:
        _publish_final(recipe, folder)
    state.wait_for_everyone()
    return folder.model


def is_finished(recipe: Recipe) -> bool:
    """True when every stage of the recipe is done and the final student was made from the last one."""
    folder = RunFolder(recipe)
    return all(place.done for place in folder.stages) and is_current(folder.model, folder.stages[-1].model)


def _reset(folder: RunFolder, resume: Resume | str) -> None:
    """Bring the run folder to the point to go on from."""
    if resume == "auto":
        return
    stages = folder.stages
    if resume != "never":
        checkpoint = Path(resume)
        found = [place for place in stages if checkpoint.resolve().parent == place.checkpoints.resolve()]
        if not found:
            raise InputError(
                f"--resume {checkpoint}: not a checkpoint of this run ({folder.path}/stages/*/checkpoints)"
            )
        step = checkpoints.step_of(checkpoint)
        if problems := checkpoints.problems(checkpoint):
            raise InputError(f"--resume {problems[0]}")
        checkpoints.remove_after(found[0].checkpoints, step)
        shutil.rmtree(found[0].model, ignore_errors=True)
        stages = stages[stages.index(found[0]) + 1 :]
    for path in [*(place.path for place in stages), folder.model]:
        if path.exists():
            logger.warning("Removing %s.", path)
            shutil.rmtree(path)


def _load_teacher(recipe: Recipe, args: TrainingArguments) -> Any:
    teacher, _ = load(resolve(recipe.model.source), dtype=getattr(torch, recipe.model.dtype), device=str(args.device))
    return teacher.requires_grad_(False)


class _StageRun:
    """One stage, from the model before it to its own."""

    def __init__(
        self, recipe: Recipe, stage: Stage, place: StageFolder, args: TrainingArguments, stop: StopSignal
    ) -> None:
        self.recipe, self.stage, self.place, self.args, self.stop = recipe, stage, place, args, stop

    def train(
        self, before: Path, teacher: Any, source: Source, data_state: State | None, validation: list[str]
    ) -> None:
        """Train from the newest checkpoint or from the start, and publish unless a signal came before the end."""
        stage = self.stage
        set_seed(self.recipe.seed)  # the Trainer does so too, but after an adapter has drawn its start
        student, tokenizer = load(before, dtype=torch.float32, device="cpu")
        checkpoint, step = self._checkpoint()
        if checkpoint:
            logger.warning("%s: going on from %s.", self.place.path.name, checkpoint.name)
            data_state = json.loads((checkpoint / checkpoints.DATA).read_text())
        loader = self._loader(source, tokenizer, data_state)
        windows = (
            validation_windows(validation, tokenizer, length=stage.sequence_length, count=stage.evaluate_windows)
            if validation
            else []
        )
        progress = None
        if self.args.process_index == 0:
            progress = ProgressCallback(stage, self.place.log, title=self.place.path.name, step=step)
        objective = make_objective(stage, teacher)
        model = make_trainable(student, stage, str(before), self.args.device)
        with objective.installed(student):
            trainer = StageTrainer(
                model,
                self.args,
                stage=stage,
                objective=objective,
                loader=loader,
                validation=windows,
                stop=self.stop,
                distributed=self.recipe.distributed,
                callbacks=[progress] if progress else [],
            )
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < stage.steps:
            assert self.stop.received is not None
            self.stop.end()
        self._publish(trainer, before, progress, loader.state)

    def _checkpoint(self) -> tuple[Path | None, int]:
        """The checkpoint to go on from and its step; found by one process, which also clears away later ones."""
        found: list[Path | None] = [None]
        if self.args.process_index == 0:
            found = [checkpoints.newest_verified(self.place.checkpoints)]
            checkpoints.remove_after(self.place.checkpoints, checkpoints.step_of(found[0]) if found[0] else 0)
        if self.args.world_size > 1:
            broadcast_object_list(found)
        return found[0], checkpoints.step_of(found[0]) if found[0] else 0

    def _loader(self, source: Source, tokenizer: Any, state: State | None) -> Loader:
        data = self.recipe.data
        rows = PackedRows(
            source,
            tokenizer,
            length=self.stage.sequence_length,
            seed=self.recipe.seed,
            block=data.shuffle_block,
            state=state,
        )
        batches = Batches(
            rows, size=self.stage.micro_batch_size, rank=self.args.process_index, world=self.args.world_size
        )
        return Loader(batches, workers=int(self.args.device.type == "cuda"))

    def _publish(
        self, trainer: StageTrainer, before: Path, progress: ProgressCallback | None, data_state: State | None
    ) -> None:
        sharded = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
        if progress is None:
            return
        seconds = progress.seconds
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if self.stage.adapter is not None:
            with publish(self.place.adapter, overwrite=True) as staging:
                save_weights(model, staging)
            model = _merged(before, self.place.adapter)
        elif not all(parameter.requires_grad for parameter in model.parameters()):
            model, sharded = _with_frozen(before, model, sharded), None
        tokens = self.stage.steps * self.stage.batch_tokens
        summary = {
            "kind": self.stage.kind,
            "tokens": tokens,
            "steps": self.stage.steps,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "device": device_name(self.args.device),
            "processes": self.args.world_size,
            "versions": versions(),
            "data_state": data_state,
        }
        write_summary(self.place, summary)
        places = RunFolder(self.recipe).stages
        done = places[: [place.path for place in places].index(self.place.path) + 1]
        publish_student(model, before, self.place.model, recipe=self.recipe, stages=done, state_dict=sharded)


def _merged(before: Path, adapter: Path) -> Any:
    """The student in float32 with an adapter merged into it; in training its matrices may be lower."""
    from peft import PeftModel

    student, _ = load(before, dtype=torch.float32, device="cpu")
    return PeftModel.from_pretrained(student, adapter).merge_and_unload()


def _with_frozen(before: Path, model: Any, sharded: dict[str, torch.Tensor] | None) -> Any:
    """The student in float32: what `model` trained, the rest as it was before; in training that may be lower."""
    student, _ = load(before, dtype=torch.float32, device="cpu")
    state = model.state_dict() if sharded is None else sharded
    trained = {name: state[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    unexpected = student.load_state_dict(trained, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return student


def _publish_final(recipe: Recipe, folder: RunFolder) -> None:
    """The last stage's student in the recipe's dtype."""
    last = folder.stages[-1].model
    if is_current(folder.model, last):
        return
    model, _ = load(last, dtype=getattr(torch, recipe.model.dtype), device="cpu")
    publish_student(model, last, folder.model, recipe=recipe, stages=folder.stages)
