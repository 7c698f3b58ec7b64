"""What a conversion will do, decided from config.json, the index and the headers alone: no weights are read.

Every tensor of the source and of the student is accounted for by name: copied, transformed, new or dropped. A tensor
that fits none of these stops the conversion.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from t2r.convert import fla
from t2r.convert.headers import BYTES_PER_ELEMENT, StoredTensor
from t2r.convert.hosts import read_host_config
from t2r.convert.source import SINGLE, Checkpoint, open_checkpoint
from t2r.errors import InputError
from t2r.model import describe, student_config
from t2r.model.mixers import Mixer, MixerOptions, assign_mixers, parse_options

Action = Literal["copied", "transformed", "new", "dropped"]
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FLOATING = ("F64", "F32", "F16", "BF16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# transformers before 4.31 stored the rotary frequencies beside the weights
_ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the student, or one of the source that the student does not keep (action "dropped").

    `dtype` is the safetensors name of the dtype as written, `source` the tensor the bytes come from (None when new).
    """

    name: str
    action: Action
    dtype: str
    shape: tuple[int, ...]
    source: StoredTensor | None = None
    note: str = ""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * BYTES_PER_ELEMENT[self.dtype]

    @property
    def layer(self) -> int | None:
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class Plan:
    """A conversion, ready to run. `shards` maps file names to tensors in the order of their bytes."""

    checkpoint: Checkpoint
    seed: int
    config: PreTrainedConfig
    student: PreTrainedModel = field(repr=False)  # on the meta device: names, shapes and initial values, no weights
    shards: dict[str, list[TensorPlan]]
    dropped: list[TensorPlan]
    ignored_config_keys: list[str]

    @property
    def tensors(self) -> list[TensorPlan]:
        """Every tensor of the student, in the order in which it is written."""
        return [tensor for tensors in self.shards.values() for tensor in tensors]

    @property
    def nbytes(self) -> int:
        """Bytes of the student's weights."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values: the whole of it, for `--json` and for the record beside the output."""
        kept = [t for t in self.tensors if t.source is not None]
        return {
            "source": self.checkpoint.name,
            "revision": self.checkpoint.revision,
            "host": self.config.model_type.removeprefix("t2r_"),
            "mixers": list(self.config.mixers),
            "seed": self.seed,
            "parameters_before": sum(t.elements for t in kept),
            "parameters_after": sum(t.elements for t in self.tensors),
            "bytes_before": sum(t.source.nbytes for t in kept if t.source),
            "bytes_after": self.nbytes,
            "tensors_by_action": dict(Counter(t.action for t in (*self.tensors, *self.dropped))),
            "state": describe(self.config),
            "ignored_config_keys": self.ignored_config_keys,
            "shards": {file: sum(t.nbytes for t in tensors) for file, tensors in self.shards.items()},
            "tensors": [_row(t) for t in (*self.tensors, *self.dropped)],
        }


def make_plan(
    source: str,
    mixers: MixerOptions | Sequence[MixerOptions] | None,
    *,
    dtype: str | None = "bfloat16",
    max_shard_size: str | int = "5GB",
    seed: int = 0,
    dry_run: bool = False,
) -> Plan:
    """Plan the conversion of a checkpoint.

    Args:
        source: a local folder or a Hub id.
        mixers: what replaces attention, in which layers (t2r.model.mixers). None: `gsa` with its defaults, or the
            mixer that a checkpoint of fla comes with.
        dtype: of the student's weights: float32, bfloat16 or float16; None keeps each tensor's own.
        max_shard_size: a number of bytes, or text such as "5GB" or "500MB" (powers of ten).
        seed: of the new tensors' initial values.
        dry_run: do not download the weights of a Hub id; the plan can be shown but not carried out.

    Raises:
        InputError: the source or an argument breaks a rule, in one line.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported; choose from {', '.join(DTYPES)}, source")
    limit = parse_size(max_shard_size)
    checkpoint = open_checkpoint(source, weights=not dry_run)
    checkpoint, host, entries, ignored = _read(checkpoint, mixers)
    _check_against_config(checkpoint, host)
    config = student_config(host, entries)
    written = DTYPES[dtype] if dtype else None
    default = written or checkpoint.tensors[_EMBEDDING].dtype
    config.dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}[default]
    student = _lay_out(config, checkpoint)
    config.architectures = [type(student).__name__]
    targets, dropped = _account(checkpoint, config, student, written, default)
    return Plan(checkpoint, seed, config, student, group_into_shards(targets, limit), dropped, ignored)


def new_tensor_names(student: PreTrainedModel) -> dict[str, tuple[int, str]]:
    """Names of the parameters that the mixers add, with their layer and their name within the mixer."""
    found = {}
    for layer, block in enumerate(student.model.layers):
        if isinstance(block.self_attn, Mixer):
            for name in block.self_attn.new_parameters():
                found[f"model.layers.{layer}.self_attn.{name}"] = (layer, name)
    return found


def parse_size(size: str | int) -> int:
    """Bytes from a count or from text such as "5GB", "500MB", "1.5 GB" (powers of ten)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip(), flags=re.IGNORECASE)
    nbytes = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if nbytes <= 0:
        raise InputError(f"max_shard_size {size!r} is no size; write it as 5GB or 500MB")
    return nbytes


def _read(
    checkpoint: Checkpoint, mixers: MixerOptions | Sequence[MixerOptions] | None
) -> tuple[Checkpoint, PreTrainedConfig, list[dict[str, Any] | None], list[str]]:
    """The checkpoint under the host's names, the host's configuration, its layers' mixers, and config keys left out."""
    if not fla.is_fla(checkpoint):
        host, ignored = read_host_config(checkpoint)
        mixers = parse_options({"name": "gsa"}) if mixers is None else mixers
        return checkpoint, host, assign_mixers(mixers, host.num_hidden_layers), ignored
    path = checkpoint.folder / "config.json"
    host, own = fla.read_config(checkpoint)
    entries = assign_mixers(own, host.num_hidden_layers)
    if mixers is not None and assign_mixers(mixers, host.num_hidden_layers) != entries:
        raise InputError(f"{path}: a checkpoint of fla has its mixer already ({entries[0]}); ask for no other")
    return fla.read_tensors(checkpoint, host.num_hidden_layers), host, entries, []


def _check_against_config(checkpoint: Checkpoint, host: PreTrainedConfig) -> None:
    """Catch a config that does not belong to these weights before a model of its size is laid out."""
    embedding = checkpoint.tensors.get(_EMBEDDING)
    if embedding is None:
        raise InputError(f"{checkpoint.folder}: tensor {_EMBEDDING} is missing; is this a causal language model?")
    if embedding.shape != (host.vocab_size, host.hidden_size):
        raise InputError(
            f"{embedding.file}: tensor {_EMBEDDING} is {list(embedding.shape)}, config.json says vocab_size x "
            f"hidden_size = [{host.vocab_size}, {host.hidden_size}]"
        )


def _lay_out(config: PreTrainedConfig, checkpoint: Checkpoint) -> PreTrainedModel:
    """The student on the meta device: every name and shape, no weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, ArithmeticError, AttributeError, RuntimeError) as error:
        # what transformers raises for an unknown activation or rope type, say: the cause stays attached
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{checkpoint.folder / 'config.json'}: no model can be built from it ({reason})") from error


def _account(
    checkpoint: Checkpoint, config: PreTrainedConfig, student: PreTrainedModel, written: str | None, default: str
) -> tuple[list[TensorPlan], list[TensorPlan]]:
    """Every tensor of the student with its origin, and the source's tensors it does without."""
    new = new_tensor_names(student)
    wanted = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted[_HEAD]
    targets = []
    for name, shape in wanted.items():
        if name in new and name not in checkpoint.tensors:
            targets.append(TensorPlan(name, "new", default, shape))
            continue
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            hint = " (tie_word_embeddings is false)" if name == _HEAD else ""
            raise InputError(f"{checkpoint.folder}: tensor {name} is missing, config.json asks for it{hint}")
        if tensor.dtype not in _FLOATING:
            raise InputError(f"{tensor.file}: tensor {name} is {tensor.dtype}; weights must be {', '.join(_FLOATING)}")
        if tensor.shape != shape:
            raise InputError(
                f"{tensor.file}: tensor {name} is {list(tensor.shape)}, config.json asks for {list(shape)}"
            )
        dtype = written or tensor.dtype
        action: Action = "copied" if dtype == tensor.dtype else "transformed"
        notes = [f"{tensor.dtype} to {dtype}"] * (action == "transformed")
        notes += [f"from {tensor.name}"] * (tensor.name != name)
        targets.append(TensorPlan(name, action, dtype, shape, tensor, ", ".join(notes)))
    reasons = _dropped(config, student)
    dropped, unknown = [], []
    for name, tensor in checkpoint.tensors.items():
        if name in wanted:
            continue
        reason = "recomputed from the configuration" if _ROTARY_BUFFER.fullmatch(name) else reasons.get(name)
        if reason:
            dropped.append(TensorPlan(name, "dropped", tensor.dtype, tensor.shape, tensor, reason))
        else:
            unknown.append(tensor)
    if unknown:
        others = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise InputError(f"{unknown[0].file}: tensor {unknown[0].name}{others} has no place in the student")
    return targets, dropped


def _dropped(config: PreTrainedConfig, student: PreTrainedModel) -> Mapping[str, str]:
    reasons = {_HEAD: f"tied to {_EMBEDDING}"} if config.tie_word_embeddings else {}
    for layer, block in enumerate(student.model.layers):
        if isinstance(block.self_attn, Mixer):
            for name in block.self_attn.drops():
                reasons[f"model.layers.{layer}.self_attn.{name}"] = f"not used by mixer {config.mixers[layer]['name']}"
    return reasons


def group_into_shards(tensors: Sequence[TensorPlan], limit: int) -> dict[str, list[TensorPlan]]:
    """Split in model order; within a file wider dtypes come first, so that every tensor stays aligned."""
    groups: list[list[TensorPlan]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    ordered = [sorted(group, key=lambda t: -BYTES_PER_ELEMENT[t.dtype]) for group in groups]
    if len(ordered) == 1:
        return {SINGLE: ordered[0]}
    return {f"model-{i:05d}-of-{len(ordered):05d}.safetensors": group for i, group in enumerate(ordered, 1)}


def build_index(shards: Mapping[str, Sequence[TensorPlan]]) -> dict[str, Any]:
    """The content of model.safetensors.index.json."""
    tensors = [t for group in shards.values() for t in group]
    return {
        "metadata": {
            "total_parameters": sum(t.elements for t in tensors),
            "total_size": sum(t.nbytes for t in tensors),
        },
        "weight_map": {t.name: file for file, group in shards.items() for t in group},
    }


def _row(tensor: TensorPlan) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "action": tensor.action,
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "bytes": tensor.nbytes,
        "source_dtype": tensor.source.dtype if tensor.source else None,
        "source_file": tensor.source.file.name if tensor.source else None,
        "note": tensor.note,
    }
