"""The record of an evaluation. `report.json` is one `Report`; Markdown, HTML and plots are pure functions of it.

Units: losses in nats per token, sizes in bytes, times in seconds. The version goes up when a reader of the old schema
would misread the new one; a reader refuses versions it does not know.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Literal[1] = 1

Role = Literal["teacher", "student", "control"]


class Record(BaseModel):
    """Frozen, and closed to unknown keys: a misspelled field is an error, not a silent loss."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=True, ser_json_inf_nan="constants")


class PositionLoss(Record):
    """Mean loss over positions start <= t < end of every window (t = 0 predicts the window's second token)."""

    start: int
    end: int
    loss: float
    tokens: int


class LanguageResult(Record):
    """Next-token loss on running text; `t2r_evals.language` holds the protocol.

    `window_losses` [windows] is what pairs two models: the same windows of the same documents. `kl_to_teacher` is the
    mean over positions of KL(teacher || model) in nats, `top1_agreement` the share of positions with the same argmax.
    """

    windows: int
    window: int
    tokens: int
    bytes: int
    loss: float
    perplexity: float
    bits_per_byte: float
    far_repeat_loss: float | None
    far_repeat_tokens: int
    far_repeat_gap: int
    far_repeat_min_id: int
    loss_by_position: list[PositionLoss]
    window_losses: list[float]
    kl_to_teacher: float | None = None
    top1_agreement: float | None = None
    data_sha256: str
    seconds: float


class TaskMetric(Record):
    value: float
    stderr: float | None = None
    higher_is_better: bool = True


class TaskResult(Record):
    """One lm-eval task. `primary` names the metric that tables show; `chance` is its value for guessing, measured
    from the documents' numbers of choices (0 for generation and cloze tasks)."""

    metrics: dict[str, TaskMetric]
    primary: str
    chance: float
    version: str
    shots: int
    documents: int
    limit: int | None
    max_length: int
    truncated: int
    seconds: float


class SpeedPoint(Record):
    """Speed at one context length and batch size. Rates in tokens per second over the whole batch."""

    context: int
    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    peak_bytes: int | None
    state_bytes: int


class ComponentResult(Record):
    """Loss of a hybrid with one component switched off. `difference` is the rise over the complete model, with a 95%
    interval over the windows; an interval that reaches zero or less flags a component that contributes nothing."""

    component: str
    modules: int
    loss: float
    far_repeat_loss: float | None
    difference: float
    low: float
    high: float


class RecallPoint(Record):
    """Look-up accuracy at one length and depth. `depth` is where the answer stands, 0 = at the start; `loss` is nats
    per answer token."""

    task: str
    length: int
    depth: float
    accuracy: float
    loss: float
    documents: int


class ModelResult(Record):
    """Everything measured on one model. Sizes: `state_bytes` per sequence, whatever its length;
    `kv_bytes_per_token` grows with it. `samples` are rows per document and metric; a report keeps them in
    samples.parquet, not in its JSON."""

    name: str
    role: Role
    parameters: int | None = None
    state_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    dtype: str | None = None
    language: LanguageResult | None = None
    tasks: dict[str, TaskResult] = {}
    speed: list[SpeedPoint] = []
    components: list[ComponentResult] = []
    recall: list[RecallPoint] = []
    samples: list[dict[str, Any]] = Field(default=[], repr=False)


class Comparison(Record):
    """`model` against `baseline` on the same items of one measurement, paired item by item.

    `difference` is model - baseline with a 95% interval; `wins`, `losses` and `ties` count items (flips, for 0/1
    metrics); `mcnemar_p` is the exact two-sided p, None where the metric is not 0/1; `recovered` is
    (model - chance) / (baseline - chance), None where the baseline is not above chance.
    """

    measurement: str
    metric: str
    model: str
    baseline: str
    items: int
    model_value: float
    baseline_value: float
    difference: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    mcnemar_p: float | None = None
    chance: float | None = None
    recovered: float | None = None


class CurvePoint(Record):
    """One logged step of a stage."""

    step: int
    tokens: int
    loss: float | None = None
    validation_loss: float | None = None
    lr: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    seconds: float | None = None


class Stage(Record):
    """One training stage and its curve. `loss_name` says what the curve's loss is (KL, MSE, cross-entropy)."""

    name: str
    kind: str
    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float | None = None
    device: str | None = None
    loss_name: str = "loss"
    curve: list[CurvePoint] = []


class Conversion(Record):
    """What the converter did. `mixer` is one line that a reader understands ("gsa, transfer, 64 slots ...")."""

    mixer: str
    layers_converted: int | None = None
    layers_total: int | None = None
    parameters_before: int | None = None
    parameters_after: int | None = None
    parameters_new: int | None = None
    seconds: float | None = None


class Sample(Record):
    """Text that a model wrote after a prompt."""

    prompt: str
    text: str
    model: str | None = None


class Example(Record):
    """A document that `baseline` had right and `model` wrong."""

    task: str
    model: str
    baseline: str
    document: str
    prompt: str
    target: str
    model_response: str
    baseline_response: str


class Run(Record):
    """One of the runs that a comparison puts side by side."""

    label: str
    source: str | None = None
    mixer: str | None = None
    tokens: int
    seconds: float
    created: str


class Report(Record):
    """The whole record of a run. Only `title`, `created` and `results` are required: an evaluation alone has no
    conversion and no stages."""

    schema_version: Literal[1] = SCHEMA_VERSION
    title: str
    created: str
    command: str = ""
    source: str | None = None
    target: str | None = None
    machine: dict[str, str] = {}
    versions: dict[str, str] = {}
    conversion: Conversion | None = None
    stages: list[Stage] = []
    results: list[ModelResult]
    comparisons: list[Comparison] | None = None
    worst: list[Example] | None = None
    runs: list[Run] = []
    samples: list[Sample] = []
    settings: dict[str, Any] = {}
    notes: list[str] = []
    seconds: float | None = None

    def by_role(self, role: Role) -> list[ModelResult]:
        """The results of that role, in order."""
        return [result for result in self.results if result.role == role]
