"""`t2r info` tells what is in a folder without loading it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from t2r.convert import convert
from t2r.model.mixers import parse_options


@pytest.fixture
def student(hosts, tmp_path):
    mixers = [parse_options({"name": "gsa", "slots": 8, "sinks": 2, "layers": "0-1"})]
    convert(hosts("llama"), tmp_path / "student", mixers=mixers)
    return tmp_path / "student"


def test_json(t2r, student):
    found = json.loads(t2r("info", student, "--json").out)
    stored = load_file(student / "model.safetensors")
    assert found["parameters"]["total"] == sum(x.numel() for x in stored.values())
    new = [x for name, x in stored.items() if "self_attn.gate" in name or "clock" in name]
    assert found["parameters"]["mixer"] == sum(x.numel() for x in new)
    heads, head_dim, slots, layers = 2, 32, 8, 2
    assert found["state_bytes"] == layers * heads * slots * 2 * head_dim * 4
    assert found["kv_bytes_per_token"] == 1 * heads * 2 * head_dim * 2
    assert found["teacher_kv_bytes_per_token"] == 3 * heads * 2 * head_dim * 2
    assert found["weights"]["bytes"] == sum(x.nbytes for x in stored.values())
    assert found["weights"]["dtypes"] == {"BF16": len(stored)}
    assert found["mixers"][2] is None
    assert found["manifest_problems"] == []


def test_tables(t2r, student, hosts):
    out = t2r("info", student).out
    for words in (
        "t2r_llama",
        "0-1",
        "gsa (style",
        "host attention, untouched",
        "mixer",
        "state per sequence 8,192 bytes",
    ):
        assert words in out, words
    assert "KV cache 1,536 bytes per token" in t2r("info", hosts("llama")).out


def test_no_weights_are_read(t2r, student, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("weights were read")

    monkeypatch.setattr(torch, "frombuffer", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    assert t2r("info", student).code == 0


def test_problems_are_told(t2r, student, tmp_path):
    (student / "tokenizer.json").unlink()
    assert "tokenizer.json: missing" in t2r("info", student).out
    path = student / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    answer = t2r("info", student)
    assert (answer.code, "truncated" in answer.err) == (2, True)
    answer = t2r("info", tmp_path / "nowhere")
    assert (answer.code, "no such folder" in answer.err) == (2, True)
