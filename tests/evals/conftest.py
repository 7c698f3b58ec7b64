"""A crafted report, an untrained model of two layers and a byte-level tokenizer: enough to hold every behaviour."""

import itertools
import math
from typing import Any

import pytest

from t2r_evals import schema
from t2r_evals.language import position_edges

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


def language_result(loss: float, *, windows: int = 24, window: int = 2048) -> schema.LanguageResult:
    edges = position_edges(window)
    losses = [loss + 0.3 * math.sin(i) for i in range(windows)]
    mean = sum(losses) / windows
    tokens = windows * window
    return schema.LanguageResult(
        windows=windows,
        window=window,
        tokens=tokens,
        bytes=4 * tokens,
        loss=mean,
        perplexity=math.exp(mean),
        bits_per_byte=mean / math.log(2) / 4,
        far_repeat_loss=mean - 0.5,
        far_repeat_tokens=tokens // 15,
        far_repeat_gap=128,
        far_repeat_min_id=300,
        loss_by_position=[
            schema.PositionLoss(start=a, end=b, loss=mean + 2 / (1 + b / 30), tokens=windows * (b - a))
            for a, b in itertools.pairwise(edges)
        ],
        window_losses=losses,
        data_sha256="0" * 64,
        seconds=3.0,
    )


def task_result(name: str, right: list[int]) -> tuple[schema.TaskResult, list[dict[str, Any]]]:
    value = sum(right) / len(right)
    result = schema.TaskResult(
        metrics={"acc": schema.TaskMetric(value=value, stderr=math.sqrt(value * (1 - value) / (len(right) - 1)))},
        primary="acc",
        chance=0.25,
        version="1.0",
        shots=0,
        documents=len(right),
        limit=None,
        max_length=2048,
        truncated=0,
        seconds=1.0,
    )
    rows = [
        {
            "task": name,
            "document": f"{name}/{i}",
            "doc_hash": f"hash{i}",
            "metric": "acc",
            "value": float(v),
            "prompt": f"Question {i} with <b>markup</b> & `ticks`?",
            "target": "A",
            "response": "A" if v else "B",
        }
        for i, v in enumerate(right)
    ]
    return result, rows


def model_result(name: str, role: Any, loss: float, right: list[int], **sizes: Any) -> schema.ModelResult:
    task, rows = task_result("arc_easy", right)
    return schema.ModelResult(
        name=name,
        role=role,
        parameters=26_700_000,
        dtype="bfloat16",
        language=language_result(loss),
        tasks={"arc_easy": task},
        samples=rows,
        **sizes,
    )


@pytest.fixture
def report() -> schema.Report:
    """Every section filled, with crafted numbers."""
    curve = [
        schema.CurvePoint(
            step=i,
            tokens=i * 4096,
            loss=3 * math.exp(-i / 40) + 0.1 * math.sin(i),
            validation_loss=3 * math.exp(-i / 40) + 0.1 if i % 20 == 0 else None,
        )
        for i in range(1, 121)
    ]
    stages = [
        schema.Stage(name=f"{i + 1}-{kind}", kind=kind, tokens=491_520, steps=120, seconds=61.2, curve=curve)
        for i, kind in enumerate(("align", "distill"))
    ]
    state = {"state_bytes": 2_097_152, "kv_bytes_per_token": 0}
    return schema.Report(
        title="A crafted report <script>alert(1)</script>",
        created="2026-01-02T03:04:05Z",
        command="t2r run demo",
        source="teacher-27m",
        target="runs/demo/model",
        machine={"processor": "a processor", "cores": "2"},
        versions={"torch": "2.13.0", "transformers": "5.23.0"},
        conversion=schema.Conversion(
            mixer="gsa (transfer, 64 slots: 4 sinks + ring 60)",
            layers_converted=8,
            layers_total=8,
            parameters_before=26_700_000,
            parameters_after=27_200_000,
            parameters_new=527_360,
        ),
        stages=stages,
        results=[
            model_result("teacher", "teacher", 2.71, [1] * 150 + [0] * 50, state_bytes=0, kv_bytes_per_token=8192),
            model_result("student", "student", 2.88, [1] * 130 + [0] * 40 + [1] * 10 + [0] * 20, **state),
            model_result("no training", "control", 3.01, [1] * 90 + [0] * 110, **state),
            model_result("window only", "control", 2.92, [1] * 100 + [0] * 100, **state),
        ],
        samples=[schema.Sample(prompt="Once upon a time", text=" there was ``` a fence.\nAnd <i>more</i>.")],
        notes=["A note."],
    )
