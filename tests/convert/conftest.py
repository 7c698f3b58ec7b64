"""Tiny random checkpoints of every supported host, and the command line without a new process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from t2r.cli import main

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
# Each host with what sets it apart: sliding windows, biases, tied embeddings, q/k norms, a head_dim of its own.
HOST_CONFIGS = {
    "mistral": MistralConfig(**SIZES, sliding_window=24),
    "llama": LlamaConfig(**SIZES, attention_bias=True, head_dim=32),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True, use_sliding_window=True, sliding_window=16,
                         max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=False),
}  # fmt: skip
EXTRA_FILES = {
    "tokenizer.json": '{"version": "1.0"}\n\n',
    "tokenizer_config.json": '{"model_max_length":   32}',
    "special_tokens_map.json": "{}",
    "chat_template.jinja": "{{ messages }}\r\n",
    "LICENSE": "Terms of use.\n",
    "README.md": "---\nlicense: apache-2.0\nlanguage: en\nauto: x\n---\n# A host\n",
}


def make_host(folder: Path, kind: str, *, shard_size: str = "5GB", dtype: torch.dtype = torch.float32) -> Path:
    """Save a random host with its tokenizer files. Biases and norms are random too, so that losing one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HOST_CONFIGS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    for name, text in EXTRA_FILES.items():
        (folder / name).write_bytes(text.encode())
    return folder


def edit_json(path: Path, **changes: object) -> None:
    """Change keys of a JSON object in place."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A read-only host by kind ("mistral", ...) and layout ("single" or "sharded")."""
    root = tmp_path_factory.mktemp("hosts")

    def get(kind: str, layout: str = "single") -> Path:
        folder = root / f"{kind}-{layout}"
        return (
            folder if folder.is_dir() else make_host(folder, kind, shard_size="5GB" if layout == "single" else "60KB")
        )

    return get


@dataclass
class Answer:
    """How the command line ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def t2r(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Run the command line in this process: t2r("convert", source, destination) -> Answer."""

    def run(*arguments: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["t2r", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        out, err = capsys.readouterr()
        return Answer(int(stop.value.code or 0), out, err)

    return run
