"""A tiny random teacher with a byte tokenizer, its student, and a recipe for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from t2r.convert import convert
from t2r.recipe import Recipe, RunFolder, parse_recipe


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after <unk>, <s> and </s>."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        sliding_window=None,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of different lengths, none longer than three hundred characters."""
    path = tmp_path_factory.mktemp("data") / "train.txt"
    documents = [f"Document {i}: " + " ".join(f"word{(i * j) % 17}" for j in range(i % 40)) for i in range(60)]
    path.write_text("\n\0\n".join(documents))
    return path


@pytest.fixture(scope="session")
def converted(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student: gsa in layers 0 and 2, the teacher's own attention in layer 1."""
    folder = tmp_path_factory.mktemp("student") / "converted"
    convert(teacher_folder, folder, mixers=parse(teacher_folder, Path("x"), Path("y"), []).mixer, dtype="float32")
    return folder


def parse(teacher: Path, text: Path, output: Path, stages: list[dict[str, Any]], **parts: Any) -> Recipe:
    """A recipe whose stages have small defaults."""
    small = {"sequence_length": 32, "batch_tokens": 128, "micro_batch_size": 2, "precision": "fp32", "log_every": 1}
    small |= {"tokens": 768, "lr": 1e-2, "warmup": 1}
    content = {
        "model": {"source": str(teacher), "dtype": "float32"},
        "mixer": {"name": "gsa", "slots": 8, "sinks": 2, "layers": "0,2"},
        "data": {"source": str(text), "shuffle_block": 16, **parts.pop("data", {})},
        "stages": [{**small, **stage} for stage in stages] or [{"kind": "align", **small}],
        "output": str(output),
        **parts,
    }
    return parse_recipe(json.dumps(content))


@pytest.fixture
def make_recipe(teacher_folder: Path, text_file: Path, converted: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe from its stages, with the converted student already in its folder."""

    def make(*stages: dict[str, Any], output: str = "run", **parts: Any) -> Recipe:
        recipe = parse(teacher_folder, text_file, tmp_path / output, list(stages), **parts)
        folder = RunFolder(recipe)
        folder.path.mkdir(exist_ok=True)
        if not folder.converted.exists():
            folder.converted.symlink_to(converted)
        return recipe

    return make


@pytest.fixture
def models_pair(teacher_folder: Path, converted: Path) -> tuple[Any, Any]:
    """(teacher, student) in fp32, the student with its gates moved off their start."""
    from t2r.model import load

    teacher, student = (load(path, dtype=torch.float32, device="cpu")[0] for path in (teacher_folder, converted))
    torch.manual_seed(1)
    for name, parameter in student.named_parameters():
        if "gate_proj" in name and "self_attn" in name:
            parameter.data.normal_(std=0.5)
    return teacher.requires_grad_(False), student
