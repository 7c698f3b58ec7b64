"""transformers' Trainer with our losses, data, optimiser groups and checkpoints."""

import json
import logging
import math
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from t2r.publish import publish
from t2r.recipe import Stage
from t2r.recipe.schema import Distributed
from t2r.train import checkpoints
from t2r.train.objectives import Objective, count
from t2r.train.packing import Loader, Row, collate
from t2r.train.parameters import optimizer_groups
from t2r.train.schedule import schedule
from t2r.train.sharding import shard
from t2r.train.signals import StopSignal
from t2r.train.state import load_state, save_state

logger = logging.getLogger(__name__)

_SCHEDULER = "scheduler.pt"


class NonFiniteError(ValueError):
    """A loss or gradient that is NaN or infinite; raised before the update it would have spoilt."""

    exit_code = 1


class StageTrainer(Trainer):
    """Trains one stage.

    Args:
        model: the student, or its peft wrapper, with the objective installed.
        stage: the stage's options.
        objective: what is minimised.
        loader: micro-batches of this process.
        validation: validation windows; empty for none.
        stop: says when to save and end.
        distributed: how processes share the model.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        stage: Stage,
        objective: Objective,
        loader: Loader,
        validation: list[Row],
        stop: StopSignal,
        distributed: Distributed,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.stage = stage
        self.objective: Objective = objective
        self.loader = loader
        self.validation = validation
        super().__init__(model, args, callbacks=[*callbacks, _Boundary(self, stop)])
        # Progress is ours; which of the two the Trainer adds depends on disable_tqdm.
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        # `compute_loss` divides by the labels of the whole step, on all devices, and labels are shifted already.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = False
        self._checked_step = -1
        self._losses: list[Tensor] = []
        if self.is_fsdp_enabled:
            shard(self.accelerator.state.fsdp_plugin, model, stage, distributed)

    # ---- optimiser and schedule

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(optimizer_groups(model, self.stage), **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> torch.optim.lr_scheduler.LRScheduler:
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, schedule(self.stage))  # type: ignore[arg-type]
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- data, loss, and the checks before an update

    def get_train_dataloader(self) -> Any:
        return self.loader

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        prepared = self.objective.prepare(inputs)
        with self._autocast():
            mean = model(**inputs, **prepared)
        # Every label of the optimiser step weighs the same, whatever micro-batch and device it is on; DDP and FSDP
        # average over devices, hence the factor.
        assert num_items_in_batch is not None
        share = count(inputs) / num_items_in_batch
        return mean * share * self.accelerator.num_processes

    def _autocast(self) -> torch.autocast:
        """The stage's precision. Not accelerate's autocast, which FSDP2 goes without.

        Every weight is used once in a pass: a cache would only keep the bf16 copies of all of them until its end.
        """
        low = self.stage.precision == "bf16"
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=low, cache_enabled=False)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss.detach())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss = torch.stack(self._losses).sum()
        self._losses.clear()
        # Both in one wait for the device, and none in the micro-batches before.
        checked = torch.stack([loss, torch.as_tensor(whole).to(loss)]).tolist()
        for what, value in zip(("loss", "gradient norm"), checked, strict=True):
            self._require_finite(what, value)
        self._checked_step = self.state.global_step
        return norm

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            kept = checkpoints.list_checkpoints(Path(str(self.args.output_dir)))
            last = f"last checkpoint: {kept[-1]}" if kept else "no checkpoint was saved yet"
            step = self.state.global_step + 1
            raise NonFiniteError(f"{self.stage.kind} step {step}: {what} is {value}; stopped before the update, {last}")

    # ---- evaluation

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean next-token cross-entropy over the validation windows, in nats per token."""
        model = self.model_wrapped
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        rank, world, size = self.args.process_index, self.args.world_size, self.stage.micro_batch_size
        # Every process makes the same number of forward passes, as FSDP needs; a repeated row counts zero times.
        for start in range(0, len(self.validation), size * world):
            rows = self.validation[start + rank * size : start + (rank + 1) * size]
            batch = self._prepare_inputs(collate(rows or self.validation[:1]))
            with self._autocast():
                loss = model(**batch, validation=True)
            if rows:
                total += torch.stack([loss.double(), count(batch).double()])
        total = self.accelerator.reduce(total, "sum")
        metrics = {"validation_loss": (total[0] / total[1]).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        folder = Path(str(self.args.output_dir))
        destination = checkpoints.path_of(folder, self.state.global_step)
        if self.args.process_index == 0:
            with publish(destination, overwrite=True) as staging:
                self._write(self._agree(staging))
                self.accelerator.wait_for_everyone()
            checkpoints.rotate(folder, self.stage.save_total_limit, destination)
        else:
            self._write(self._agree(None))
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    def _agree(self, staging: Path | None) -> Path:
        """The staging folder of process 0, in every process."""
        shared = [str(staging)]
        if self.args.world_size > 1:
            broadcast_object_list(shared)
        return Path(shared[0])

    def _write(self, staging: Path) -> None:
        if self.is_fsdp_enabled or self.args.should_save:
            save_state(
                staging / checkpoints.WEIGHTS, cast(nn.Module, self.model), self.optimizer, sharded=self.is_fsdp_enabled
            )
        self._save_rng_state(str(staging))
        if self.args.process_index == 0:
            torch.save(self.lr_scheduler.state_dict(), staging / _SCHEDULER)  # type: ignore[union-attr]
            self.state.save_to_json(str(staging / checkpoints.STATE))
            (staging / checkpoints.DATA).write_text(json.dumps(self.loader.state))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: the weights come with the optimizer's state, when both are in their places."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        folder = Path(checkpoint)
        load_state(
            folder / checkpoints.WEIGHTS, cast(nn.Module, self.model), self.optimizer, sharded=self.is_fsdp_enabled
        )
        self.lr_scheduler.load_state_dict(torch.load(folder / _SCHEDULER, weights_only=True))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


def save_weights(model: Any, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Weights and configuration of a student, or of the adapter alone where it has one, as safetensors."""
    # Else peft asks the Hub whether the vocabulary was resized.
    options = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(folder, state_dict=state_dict, **options)


class _Boundary(TrainerCallback):
    """What happens between two steps: saving by `save_every` and on a signal, evaluating by `evaluate_every`."""

    def __init__(self, trainer: StageTrainer, stop: StopSignal) -> None:
        self._trainer = trainer
        self._stop = stop

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self._trainer._checked_step == state.global_step, "the gradient norm was not checked before the update"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        stage, last = self._trainer.stage, state.global_step >= state.max_steps
        stop = self._stop.received is not None
        if args.world_size > 1:  # a signal may reach one process only, and saving is something all do together
            trainer = self._trainer.accelerator
            if stop:
                trainer.set_trigger()
            stop = trainer.check_trigger()
        every = stage.save_every is not None and state.global_step % stage.save_every == 0
        control.should_save = (stop or every) and not last  # after the last step the stage's model is written
        if self._trainer.validation:
            every = stage.evaluate_every is not None and state.global_step % stage.evaluate_every == 0
            control.should_evaluate = last or (every and not stop)
        control.should_log = control.should_log or last or control.should_evaluate
        control.should_training_stop = control.should_training_stop or stop
