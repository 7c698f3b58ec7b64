"""Merge a LoRA adapter into its student: `t2r export ADAPTER DST --format hf`."""

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from t2r.convert.card import write_export_card
from t2r.convert.directio import VerificationError
from t2r.convert.headers import read_header
from t2r.convert.run import RECORD, check_destination
from t2r.convert.source import member, open_checkpoint, read_json
from t2r.convert.stream import TORCH_DTYPES, is_finite
from t2r.errors import InputError
from t2r.publish import publish

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft needs to rebuild a LoRA adapter; every other key (auto_mapping names a library to import) is left behind.
_LORA_KEYS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layers_pattern",
    "task_type",
)  # fmt: skip


def merge_adapter(
    adapter: Path,
    destination: Path,
    *,
    base: str | None = None,
    overwrite: bool = False,
    command: Sequence[str] | None = None,
) -> None:
    """Publish the student that an adapter was trained on, with the adapter added to its weights.

    The sum is taken in float32 and stored in the student's own dtypes. The whole model is held in memory.

    Args:
        adapter: a folder that peft saved: adapter_config.json and adapter_model.safetensors.
        destination: folder to publish.
        base: folder of the student, when it no longer lies where adapter_config.json says.
        overwrite: replace a folder that t2r published before.
        command: the command line, for the model card.

    Raises:
        InputError: no adapter there, not a LoRA adapter, or one that does not fit its student.
    """
    settings = _read_settings(adapter)
    source = base or settings.get("base_model_name_or_path")
    if not isinstance(source, str) or not Path(source).is_dir():
        raise InputError(f"{adapter / ADAPTER_CONFIG}: its student {source!r} is no folder here; name it with --base")
    for folder in (source, str(adapter)):
        check_destination(folder, destination, overwrite=overwrite)
    student = open_checkpoint(source)
    model = AutoModelForCausalLM.from_pretrained(
        student.folder, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    merged = _merge(model, adapter, settings)
    tensors = merged.state_dict()
    stored = {name: tensors[name].to(TORCH_DTYPES[entry.dtype]) for name, entry in student.tensors.items()}
    for name, tensor in stored.items():
        if not is_finite(tensor):
            raise InputError(f"{adapter / ADAPTER_WEIGHTS}: {name} holds NaN or Inf with the adapter added")
    merged.config.dtype = student.config.get("dtype")
    with publish(destination, overwrite=overwrite) as staging:
        merged.save_pretrained(staging, state_dict=stored, max_shard_size="5GB")
        _verify(staging, stored)
        for path in (*student.copied_files(), student.folder / RECORD):
            if path.is_file():
                shutil.copyfile(path, staging / path.name)
        write_export_card(student, staging, f"The LoRA adapter `{adapter}` was merged into the weights.", command)


def _read_settings(adapter: Path) -> dict[str, Any]:
    if not adapter.is_dir():
        raise InputError(f"{adapter}: no such folder")
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise InputError(f"{adapter}: no {ADAPTER_CONFIG} in the folder: not an adapter, so there is nothing to merge")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"{adapter}: no {ADAPTER_WEIGHTS} in the folder (adapters saved as pickles are not read)")
    settings = read_json(adapter, ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{adapter / ADAPTER_CONFIG}: peft_type {settings.get('peft_type')!r}, only LORA is merged")
    return settings


def _merge(model: Any, adapter: Path, settings: dict[str, Any]) -> Any:
    stored = set(read_header(member(adapter, ADAPTER_WEIGHTS)))
    options = {key: settings[key] for key in _LORA_KEYS if settings.get(key) is not None}
    try:
        with warnings.catch_warnings(action="ignore"):  # of missing keys: they are an error below
            adapted = PeftModel.from_pretrained(model, str(adapter), config=LoraConfig(**options))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{adapter}: the adapter does not fit its student ({reason})") from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if wanted != stored:
        name = sorted(wanted ^ stored)[0]
        fault = "is missing from" if name in wanted else "of the student is unknown, but stored in"
        raise InputError(f"{adapter / ADAPTER_WEIGHTS}: the adapter does not fit its student: {name} {fault} the file")
    return adapted.merge_and_unload()


def _verify(folder: Path, stored: dict[str, Tensor]) -> None:
    """Read the files back and compare every tensor, bit for bit."""
    found: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        path.chmod(0o644)  # safetensors writes 0600
        read_header(path)
        for name, tensor in load_file(path).items():
            if name not in stored or not torch.equal(tensor.view(torch.uint8), stored[name].view(torch.uint8)):
                raise VerificationError(f"{path}: {name} differs from what was written into it")
            found.add(name)
    if found != set(stored):
        raise VerificationError(f"{folder}: {len(set(stored) - found)} tensors were not written")
