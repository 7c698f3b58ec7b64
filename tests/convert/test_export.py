"""`t2r export --format hf`: a merged student is the adapted one, in an ordinary folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from t2r.convert import convert
from t2r.model.mixers import parse_options
from t2r.publish import verify_manifest
from tests.convert.conftest import edit_json


@pytest.fixture(scope="module")
def adapted(hosts, tmp_path_factory) -> tuple[Path, Path, torch.Tensor]:
    """A student, a LoRA adapter on it (mixer and MLP) as peft saves it, and the adapted student's logits."""
    root = tmp_path_factory.mktemp("adapted")
    convert(hosts("qwen2"), root / "student", mixers=parse_options({"name": "gsa", "slots": 8}), dtype=None)
    model = AutoModelForCausalLM.from_pretrained(root / "student", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "gate_proj", "down_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    peft_model.peft_config["default"].base_model_name_or_path = str(root / "student")
    peft_model.save_pretrained(root / "adapter", save_embedding_layers=False)
    with torch.no_grad():
        logits = peft_model.eval()(torch.arange(30)[None]).logits
    return root / "student", root / "adapter", logits


def test_merged_student_gives_the_adapted_logits(t2r, adapted, tmp_path):
    student, adapter, logits = adapted
    answer = t2r("export", adapter, tmp_path / "merged", "--format", "hf")
    assert answer.code == 0, answer.err
    assert verify_manifest(tmp_path / "merged") == []
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=False).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(torch.arange(30)[None]).logits, logits)
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rsplit(".", 2)[1] for name in changed} == {"q_proj", "gate_proj", "down_proj"}
    for name in ("tokenizer.json", "LICENSE", "conversion.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (student / name).read_bytes()
    assert "t2r export" in (tmp_path / "merged" / "README.md").read_text()
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in (tmp_path / "merged").iterdir())


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def with_other_tensors(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / "adapter_model.safetensors")


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[:] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "nothing to merge"),
        (without_weights, "pickles are not read"),
        (lambda folder: edit_json(folder / "adapter_config.json", peft_type="PROMPT_TUNING"), "only LORA is merged"),
        (lambda folder: edit_json(folder / "adapter_config.json", base_model_name_or_path="gone"), "--base"),
        (lambda folder: edit_json(folder / "adapter_config.json", r=8), "does not fit"),
        (with_other_tensors, "is missing from"),
        (with_nan, "NaN or Inf"),
    ],
)
def test_bad_adapters(t2r, adapted, tmp_path, change, words):
    shutil.copytree(adapted[1], tmp_path / "adapter")
    change(tmp_path / "adapter")
    answer = t2r("export", tmp_path / "adapter", tmp_path / "out" / "merged")
    assert answer.code == 2
    assert words in answer.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_code_named_in_the_adapter_is_not_imported(t2r, adapted, tmp_path):
    shutil.copytree(adapted[1], tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", auto_mapping={"parent_library": "evil"}, runtime_config={})
    assert t2r("export", tmp_path / "adapter", tmp_path / "merged", "--base", adapted[0]).code == 0
