"""The stages of a recipe: what is trained, on how many tokens, with which optimiser."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from t2r.recipe.counts import Count

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: immutable, unknown keys refused, types taken as written, NaN and infinity refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class LearningRates(Section):
    """Peak learning rates by group of parameters. A plain number in a recipe sets `mixer` and `rest` alike."""

    mixer: NotNegative = Field(description="every parameter of the mixers, the host's q, k, v and o included")
    rest: NotNegative = Field(description="everything else")
    new: NotNegative | None = Field(
        default=None, description="the mixers' new parameters (gates, clocks); null: as mixer"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"mixer": value, "rest": value}
        return value


class Lora(Section):
    """A low-rank adapter (peft), trained in place of the parameters it is added to."""

    kind: Literal["lora"]
    r: Annotated[int, Field(gt=0)] = 16
    alpha: Positive | None = Field(default=None, description="scale of the adapter; null: 2 r")
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"],
        min_length=1,
        description="module names to adapt, matched at the end of the full name; self_attn.gate_proj is a mixer's gate",
    )


def _whole_when_steps(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 and value != int(value):
        raise ValueError("is a whole number of steps, or a fraction below 1 of all steps")
    return value


class BaseStage(Section):
    """What all kinds of stages share."""

    kind: str
    tokens: Count = Field(description="training tokens of the stage")
    sequence_length: Count = Field(default=2048, description="tokens per row; data.sequence_length unless written here")
    batch_tokens: Count = Field(default=65536, description="tokens per optimiser step, over all devices")
    micro_batch_size: Annotated[int, Field(gt=0)] = Field(default=1, description="rows per forward pass and device")
    lr: LearningRates
    schedule: Literal["cosine", "constant-with-decay", "linear", "constant"] = "cosine"
    warmup: Annotated[NotNegative, BeforeValidator(_whole_when_steps)] = Field(
        default=0.01, description="below 1: fraction of the steps; otherwise a number of steps"
    )
    min_lr_ratio: Fraction = Field(default=0.1, description="learning rate at the end over its peak")
    decay: Fraction = Field(
        default=0.15, description="constant-with-decay: the last fraction of the steps, annealed linearly"
    )
    weight_decay: NotNegative = Field(
        default=0.01, description="not applied to norms, biases and the mixers' new parameters"
    )
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    clip: Positive | None = Field(default=1.0, description="largest gradient norm; null: no clipping")
    gradient_checkpointing: bool = False
    fused: bool = Field(
        default=True,
        description="norms and activations by liger-kernel, where it is installed and a GPU trains; the log says so",
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="bf16", description="bf16: fp32 weights, forward and backward in bf16"
    )
    log_every: Annotated[int, Field(gt=0)] = Field(default=10, description="steps")
    evaluate_every: Annotated[int, Field(gt=0)] | None = Field(default=None, description="steps; null: at the end")
    evaluate_windows: Annotated[int, Field(gt=0)] = Field(
        default=16, description="validation windows of sequence_length"
    )
    save_every: Annotated[int, Field(gt=0)] | None = Field(
        default=None, description="steps; null: at the end and on a signal"
    )
    save_total_limit: Annotated[int, Field(gt=0)] = Field(default=2, description="checkpoints kept, newest first")

    @property
    def steps(self) -> int:
        """Optimiser steps: whole batches within `tokens`."""
        return self.tokens // self.batch_tokens

    @property
    def warmup_steps(self) -> int:
        """Steps of linear warm-up."""
        return round(self.warmup * self.steps) if self.warmup < 1 else int(self.warmup)

    @model_validator(mode="after")
    def _adapter_trains_itself(self) -> "BaseStage":
        train = getattr(self, "train", "all")
        if getattr(self, "adapter", None) is not None and train != "all":
            raise ValueError(f"train: {train!r} does not go with an adapter, whose own parameters are what is trained")
        return self

    @model_validator(mode="after")
    def _batch_holds_rows(self) -> "BaseStage":
        rows = self.sequence_length * self.micro_batch_size
        if self.batch_tokens % rows:
            raise ValueError(
                f"batch_tokens: {self.batch_tokens} is no multiple of sequence_length x micro_batch_size = "
                f"{self.sequence_length} x {self.micro_batch_size} = {rows}"
            )
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens: {self.tokens} is less than one batch of batch_tokens = {self.batch_tokens}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup: {self.warmup_steps} steps, but the stage has only {self.steps}")
        return self


class AlignStage(BaseStage):
    """Each mixer learns to give its teacher layer's attention output, from the teacher's own input to that layer."""

    kind: Literal["align"]
    sequence_length: Count = 512
    lr: LearningRates = LearningRates(mixer=1e-3, rest=0.0)
    min_lr_ratio: Fraction = 0.01
    train: Literal["mixer", "new"] = Field(
        default="mixer", description="mixer: q, k, v, o and the new parameters; new: only those"
    )
    adapter: None = Field(default=None, description="align trains the mixers themselves")


class DistillStage(BaseStage):
    """The student learns the teacher's next-token distribution: KL(teacher || student) on the logits."""

    kind: Literal["distill"]
    lr: LearningRates = LearningRates(mixer=1e-4, rest=1e-5)
    schedule: Literal["cosine", "constant-with-decay", "linear", "constant"] = "constant-with-decay"
    train: Literal["mixer", "new", "all"] = "all"
    adapter: Lora | None = None
    teacher_top_k: Annotated[int, Field(gt=0)] | None = Field(
        default=None,
        description="compare the teacher's k likeliest tokens and the rest as one; null: the whole vocabulary",
    )
    temperature: Positive = 1.0
    ce_weight: NotNegative = Field(default=0.0, description="weight of the next-token cross-entropy added to the KL")


class FinetuneStage(BaseStage):
    """The student learns the text: next-token cross-entropy."""

    kind: Literal["finetune"]
    lr: LearningRates = LearningRates(mixer=1e-5, rest=1e-5)
    train: Literal["mixer", "new", "all"] = "all"
    adapter: Lora | None = None


Stage = Annotated[AlignStage | DistillStage | FinetuneStage, Field(discriminator="kind")]
