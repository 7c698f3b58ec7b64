"""The typed recipe: one file is the whole run. `t2r recipes validate --schema` prints this as JSON schema."""

from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, field_serializer, model_validator

from t2r.model.mixers import AnyMixerOptions
from t2r.recipe.counts import Count
from t2r.recipe.stages import Section, Stage

Text = Annotated[str, Field(min_length=1)]


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class Model(Section):
    """The teacher, and the precision of what is written."""

    source: Text = Field(description="the teacher: a folder, shipped:NAME or a Hub id")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16",
        description="of the teacher, the converted and the final student; training holds fp32 weights",
    )


class DataSource(Section):
    """Where documents come from."""

    source: Annotated[list[Text], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        description="text, JSONL or parquet files, folders or globs of those, shipped:NAME, or one `datasets` name"
    )
    config_name: Text | None = Field(default=None, description="`datasets` configuration")
    split: Text = Field(default="train", description="`datasets` split")
    revision: Text | None = Field(default=None, description="`datasets` revision")
    streaming: bool = Field(default=True, description="read a `datasets` name as a stream; false: download it first")
    text_field: Text = Field(default="text", description="column of JSONL, parquet and `datasets` records")
    document_separator: Literal["nul", "none"] = Field(
        default="nul",
        description="text files: documents end at a line holding one NUL character; none: a file is a document",
    )


class Data(DataSource):
    """Training text, and the text that validation reads."""

    sequence_length: Count | None = Field(default=None, description="of every stage that does not set its own")
    shuffle_block: Annotated[int, Field(ge=0)] = Field(
        default=4096,
        description="documents permuted at a time, differently in every epoch; 0: in the order of the source",
    )
    validation: DataSource | None = None


class Calibrate(Section):
    """Whether `t2r run` measures the untrained student on the first windows of the training text: every layer's output
    error, KL and loss."""

    windows: Annotated[int, Field(ge=0)] = Field(default=0, description="windows of text; 0: do not measure")
    window: Count = Field(default=2048, description="tokens per window")


class Place(Section):
    """Whether `t2r run` and `t2r finetune` share the mixer's slots out among the key/value heads before the conversion:
    the same number in all, where the first windows of the training text say that they are needed, as
    `t2r select-layers --slots` does. It loads the teacher; what was chosen is kept in the output folder."""

    windows: Annotated[int, Field(ge=0)] = Field(default=0, description="windows of text; 0: slots as the mixer says")
    window: Count = Field(default=2048, description="tokens per window; no head gets that many slots")


class Evaluate(Section):
    """What `t2r run` measures at the end, on teacher, student and controls."""

    suites: list[Text] = Field(default=[])
    tasks: list[Text] = Field(default=[])
    baseline: Literal["source"] | None = Field(default="source", description="source: the teacher beside the student")
    controls: list[Literal["no-training", "window-only", "teacher-finetuned"]] = Field(
        default=[],
        description="no-training: as converted; window-only: softmax over as many tokens as there are slots; "
        "teacher-finetuned: the teacher trained by cross-entropy on the stages' token budget",
    )
    windows: Annotated[int, Field(gt=0)] = Field(default=48, description="validation windows")
    window: Count = Field(default=2048, description="tokens per validation window")
    limit: Annotated[int, Field(gt=0)] | None = Field(default=None, description="examples per task; null: all")
    batch_size: Annotated[int, Field(gt=0)] = Field(default=8, description="sequences at a time; changes no result")
    max_length: Count = Field(default=2048, description="context for tasks, in tokens; longer prompts are cut, counted")
    recall_lengths: list[Count] = Field(default=[512, 1024, 2048], description="for the suite synthetic, in tokens")
    recall_items: Annotated[int, Field(gt=0)] = Field(default=10, description="the same, per length and depth")
    speed_contexts: list[Count] = Field(default=[], description="prompt lengths at which speed is measured, in tokens")
    largest_batch: Annotated[int, Field(gt=0)] = Field(
        default=1, description="on a GPU, speed also at the largest batch up to this that fits"
    )
    offline_root: Text | None = Field(default=None, description="folder that stands in for the Hub's data sets")


class Generate(Section):
    """Samples from the final student."""

    prompts: list[str] = Field(default=[])
    max_new_tokens: Annotated[int, Field(gt=0)] = 64


class Log(Section):
    """Trackers beside the JSONL log, which is always written."""

    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    project: Text = "t2r"


class Distributed(Section):
    """How torchrun's processes share the model. One process: ignored."""

    fsdp: bool = Field(default=False, description="shard weights, gradients and optimiser (FSDP2); false: DDP")
    gather: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="precision in which FSDP gathers weights for bf16 stages; fp32: the same results as one GPU, "
        "bf16: half the traffic, gates and clocks rounded in the forward pass",
    )


class Recipe(Section):
    """A whole run: source, mixer, data, stages, evaluation."""

    model: Model
    mixer: Annotated[list[AnyMixerOptions], BeforeValidator(_as_list), Field(min_length=1)]
    data: Data
    place: Place = Place()
    calibrate: Calibrate = Calibrate()
    stages: list[Stage] = Field(min_length=1)
    evaluate: Evaluate = Evaluate()
    generate: Generate = Generate()
    log: Log = Log()
    distributed: Distributed = Distributed()
    output: Text = Field(description="folder of the run")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="before")
    @classmethod
    def _stages_inherit_sequence_length(cls, value: Any) -> Any:
        """A stage without its own sequence_length takes the data's, so that the resolved recipe shows it."""
        length = value.get("data", {}).get("sequence_length") if _has_parts(value) else None
        if length is None:
            return value
        stages = [{"sequence_length": length, **s} if isinstance(s, dict) else s for s in value["stages"]]
        return {**value, "stages": stages}

    @model_validator(mode="after")
    def _one_mixer_is_placed(self) -> "Recipe":
        if self.place.windows and len(self.mixer) > 1:
            raise ValueError(f"place.windows: slots are placed for one mixer, not for {len(self.mixer)}; set it to 0")
        return self

    @model_validator(mode="after")
    def _validation_is_there(self) -> "Recipe":
        for index, stage in enumerate(self.stages):
            if stage.evaluate_every is not None and self.data.validation is None:
                raise ValueError(f"stages.{index}.evaluate_every: needs data.validation")
        return self

    @field_serializer("mixer")
    def _mixer_with_layers(self, mixers: list[AnyMixerOptions]) -> list[dict[str, Any]]:
        # Not the plain dump: that has the options of every style, which the loader refuses.
        return [{**mixer.stored(), "layers": mixer.layers} for mixer in mixers]


def _has_parts(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("data"), dict) and isinstance(value.get("stages"), list)


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal Recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
