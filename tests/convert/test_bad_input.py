"""Bad checkpoints: one line that names the file and the rule, exit code 2, no traceback, nothing left behind."""

import json
import shutil
import struct
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2r.convert.headers import read_header
from t2r.errors import InputError
from tests.convert.conftest import edit_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN_FILES = {
    "empty": (b"", "too short"),
    "seven bytes": (b"1234567", "too short"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git LFS pointer"),
    "header length": (struct.pack("<Q", 2**63) + b"{}", "header length"),
    "header cut": (struct.pack("<Q", 100) + b"{}", "truncated"),
    "not json": (pack(b"{'a': 1}"), "JSON"),
    "not utf-8": (pack(b'{"\xff": 1}'), "JSON"),
    "deep json": (pack(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "JSON"),
    "json list": (pack([]), "expected an object"),
    "duplicate tensor": (pack(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{}}'), "appears twice"),
    "truncated": (pack({"a": entry(0, 8, [2])}, b"1234"), "truncated"),
    "padded": (pack({"a": entry(0, 4, [1])}, b"12345678"), "padded"),
    "overlap": (pack({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, b"0" * 12), "overlaps"),
    "hole": (pack({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"0" * 12), "hole"),
    "shape": (pack({"a": entry(0, 4, [2])}, b"0" * 4), "needs 8"),
    "negative shape": (pack({"a": entry(0, 4, [-1, -1])}, b"0" * 4), "not counts"),
    "float offset": (pack({"a": entry(0, 4.0, [1])}, b"0" * 4), "not counts"),
    "true shape": (pack({"a": entry(0, 4, [True])}, b"0" * 4), "not counts"),
    "dtype": (pack({"a": entry(0, 4, [1], "F31")}, b"0" * 4), "dtype 'F31'"),
    "no shape": (pack({"a": {"dtype": "F32"}}), "no dtype, shape"),
    "line break in a name": (pack({"a\nb": entry(0, 4, [1])}, b"0" * 4), "cannot be printed"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_broken_files(tmp_path, name):
    data, words = BROKEN_FILES[name]
    path = tmp_path / SINGLE
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        read_header(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_tensors_are_fine(tmp_path):
    path = tmp_path / SINGLE
    path.write_bytes(pack({"b": entry(0, 4, [1]), "a": entry(0, 0, [0, 3]), "c": entry(4, 4, [0])}, b"1234"))
    assert set(read_header(path)) == {"a", "b", "c"}


# Each case changes a good checkpoint (single or sharded, float32 mistral) and names what the message must say.
Case = namedtuple("Case", "layout words change arguments", defaults=[()])


def edit_index(folder: Path, change: Callable[[dict], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def edit_tensors(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def repeat_key(path: Path) -> None:
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"lm_head.weight": "a.safetensors",'))


def second_copy(folder: Path) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    tensors = load_file(shards[1])
    tensors["model.embed_tokens.weight"] = load_file(shards[0])["model.embed_tokens.weight"]
    save_file(tensors, shards[1], {"format": "pt"})


def link_out(folder: Path) -> None:
    target = folder.parent / "elsewhere.safetensors"
    (folder / SINGLE).rename(target)
    (folder / SINGLE).symlink_to(target)


def quantise(tensors: dict) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)


def poison(value: float) -> Callable[[Path], None]:
    def change(tensors: dict) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][7, 3] = value

    return lambda folder: edit_tensors(folder, change)


first_shard = "model-00001-of-"
CASES = {
    "empty folder": Case("single", "empty", lambda f: [p.unlink() for p in f.iterdir()]),
    "no config": Case("single", "no config.json", lambda f: (f / "config.json").unlink()),
    "no weights": Case("single", "no weights", lambda f: (f / SINGLE).unlink()),
    "pickle": Case("single", "pickle", only_pickle),
    "broken config": Case("single", "not readable as JSON", lambda f: (f / "config.json").write_text("{")),
    "list config": Case("single", "expected an object", lambda f: (f / "config.json").write_text("[]")),
    "architecture": Case("single", "supported are mistral, llama, qwen2, qwen3", config(model_type="gpt2")),
    "no architecture": Case("single", "supported are", config(model_type=None)),
    "quantised config": Case("single", "quantization_config", config(quantization_config={"bits": 4})),
    "quantised weights": Case("single", "is I8", lambda f: edit_tensors(f, quantise)),
    "heads": Case("single", "not divisible by num_key_value_heads 3", config(num_key_value_heads=3)),
    "hidden": Case("single", "not divisible", config(num_attention_heads=6, num_key_value_heads=2, head_dim=None)),
    "negative": Case("single", "intermediate_size is -80", config(intermediate_size=-80)),
    "zero layers": Case("single", "num_hidden_layers is 0", config(num_hidden_layers=0)),
    "text size": Case("single", "vocab_size is '96'", config(vocab_size="96")),
    "true size": Case("single", "num_key_value_heads is True", config(num_key_value_heads=True)),
    "odd head": Case("single", "head_dim is 15", config(head_dim=15)),
    "missing size": Case("single", "hidden_size is missing", config(hidden_size=None)),
    "eps": Case("single", "rms_norm_eps", config(rms_norm_eps=-1e-5)),
    "a billion layers": Case("single", "the weights have 3 layers", config(num_hidden_layers=10**9)),
    "a billion layers, listed": Case(
        "single", "the weights have 3 layers", config(model_type="qwen2", num_hidden_layers=10**9)
    ),
    "huge vocabulary": Case("single", "vocab_size x hidden_size", config(vocab_size=10**12)),
    "other vocabulary": Case("single", "vocab_size x hidden_size", config(vocab_size=97)),
    "huge mlp": Case("single", "config.json", config(intermediate_size=10**30)),
    "other mlp": Case("single", "mlp.gate_proj.weight is [80, 64]", config(intermediate_size=96)),
    "activation": Case("single", "no_such_activation", config(hidden_act="no_such_activation")),
    "wrong type": Case("single", "use_cache", config(use_cache="perhaps")),
    "rope": Case("single", "no_such_type", config(rope_parameters={"rope_type": "no_such_type", "rope_theta": 1e4})),
    "rope-theta": Case("single", "rope_theta", config(rope_parameters={"rope_type": "default", "rope_theta": -1.0})),
    "rope-factor": Case("single", "factor", config(rope_scaling={"rope_type": "linear", "factor": 0.0})),
    "dropout": Case("single", "attention_dropout", config(attention_dropout=-3.0)),
    "missing tensor": Case(
        "single", "norm.weight is missing", lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight"))
    ),
    "missing head": Case(
        "single", "tie_word_embeddings is false", lambda f: edit_tensors(f, lambda t: t.pop("lm_head.weight"))
    ),
    "unknown tensor": Case(
        "single",
        "model.extra.weight has no place",
        lambda f: edit_tensors(f, lambda t: t.update({"model.extra.weight": torch.ones(1)})),
    ),
    "biases unasked for": Case(
        "single",
        "q_proj.bias has no place",
        lambda f: edit_tensors(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})),
    ),
    "lfs pointer": Case("single", "Git LFS", lambda f: (f / SINGLE).write_bytes(BROKEN_FILES["lfs"][0])),
    "truncated": Case("single", "truncated", lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes()[:-1])),
    "padded": Case("single", "padded", lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"\0")),
    "link out of the folder": Case("single", "leaves the folder", link_out),
    "unlisted beside single": Case("single", "lists it", lambda f: shutil.copy(f / SINGLE, f / "model-2.safetensors")),
    "no index": Case("sharded", "neither model.safetensors nor", lambda f: (f / INDEX).unlink()),
    "shard absent": Case("sharded", "absent", lambda f: sorted(f.glob("*.safetensors"))[1].unlink()),
    "shard unlisted": Case(
        "sharded", "not listed", lambda f: shutil.copy(sorted(f.glob("*.safetensors"))[0], f / "model-9.safetensors")
    ),
    "tensor twice": Case("sharded", "in two shards", second_copy),
    "index names a tensor that is not there": Case(
        "sharded",
        "does not hold tensor model.nope",
        lambda f: edit_index(f, lambda m: m.update({"model.nope": next(iter(m.values()))})),
    ),
    "index forgets a tensor": Case(
        "sharded", "in nowhere", lambda f: edit_index(f, lambda m: m.pop("model.norm.weight"))
    ),
    "index leaves the folder": Case(
        "sharded",
        "leaves the folder",
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "../x.safetensors"})),
    ),
    "index is absolute": Case(
        "sharded",
        "leaves the folder",
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "/etc/passwd"})),
    ),
    "index names a pickle": Case(
        "sharded",
        "no safetensors file",
        lambda f: edit_index(f, lambda m: m.update({"model.norm.weight": "config.json"})),
    ),
    "index without map": Case("sharded", "no weight_map", lambda f: (f / INDEX).write_text('{"weight_map": 3}')),
    "index repeats a key": Case("sharded", "appears twice", lambda f: repeat_key(f / INDEX)),
    "nan": Case("single", "--allow-nonfinite", poison(float("nan"))),
    "inf": Case("single", "--allow-nonfinite", poison(float("-inf"))),
    "too large for float16": Case("single", "range of F16", poison(1e6), ("--dtype", "float16")),
    "shard size": Case("single", "max_shard_size 'big'", lambda f: None, ("--max-shard-size", "big")),
    "mixer": Case("single", "did you mean 'gsa'", lambda f: None, ("--mixer", "gsaa")),
    "mixer option": Case("single", "did you mean 'sinks'", lambda f: None, ("--set", "sink=3")),
    "layers": Case("single", "layers", lambda f: None, ("--layers", "0-7")),
    "slots": Case("single", "slots", lambda f: None, ("--slots", "-1")),
    "set without value": Case("single", "KEY=VALUE", lambda f: None, ("--set", "sinks")),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_nothing_left(t2r, hosts, tmp_path, name):
    case = CASES[name]
    source = tmp_path / "source"
    shutil.copytree(hosts("mistral", case.layout), source)
    case.change(source)
    before = {path for path in tmp_path.rglob("*") if "source" not in path.relative_to(tmp_path).parts}
    answer = t2r("convert", source, tmp_path / "out" / "student", *case.arguments)
    complaint = [line for line in answer.err.splitlines() if line.startswith("Error: ")]
    assert answer.code == 2, answer
    assert len(complaint) == 1
    assert answer.err.strip().splitlines()[-1] == complaint[0]
    assert case.words in complaint[0]
    assert "Traceback" not in answer.err
    after = {path for path in tmp_path.rglob("*") if "source" not in path.relative_to(tmp_path).parts}
    assert {path for path in after - before if path.is_file() or path.name != "out"} == set()


def test_missing_folder(t2r, tmp_path):
    answer = t2r("convert", tmp_path / "nowhere", tmp_path / "student")
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "no such folder" in answer.err


def test_hub_id_without_network(t2r, tmp_path):
    answer = t2r("convert", "no-such-org/no-such-model", tmp_path / "student")
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "Hub cannot be reached" in answer.err


def test_no_traceback_from_a_real_process(hosts, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hosts("mistral"), source)
    edit_json(source / "config.json", model_type="bert")
    done = subprocess.run(
        [sys.executable, "-m", "t2r", "convert", source, tmp_path / "student"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "bert" in done.stderr


def test_output_equal_to_input(t2r, hosts, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hosts("mistral"), source)
    (tmp_path / "link").symlink_to(source)
    for destination in (source, tmp_path / "link", source / "inside", tmp_path):
        answer = t2r("convert", source, destination, "--overwrite")
        assert answer.code == 2, destination
        assert "output and input" in answer.err, destination


def test_output_that_cannot_be(t2r, hosts, tmp_path):
    (tmp_path / "file").write_text("")
    answer = t2r("convert", hosts("mistral"), tmp_path / "file" / "student")
    assert (answer.code, "is no folder" in answer.err) == (2, True)
    answer = t2r("convert", hosts("mistral"), tmp_path / "file", "--overwrite")
    assert (answer.code, "t2r did not write it" in answer.err) == (2, True)
    answer = t2r("convert", tmp_path / "file", tmp_path / "student")
    assert (answer.code, "expected the folder of a checkpoint" in answer.err) == (2, True)


def test_full_disk_is_seen_before_writing(t2r, hosts, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    answer = t2r("convert", hosts("mistral"), tmp_path / "a" / "student")
    assert answer.code == 2
    assert "needs 0.07 GB, the disk has 0.00 GB free" in answer.err
    assert not (tmp_path / "a").exists()


def test_nonfinite_weights_pass_when_asked(t2r, hosts, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hosts("mistral"), source)
    poison(float("nan"))(source)
    assert t2r("convert", source, tmp_path / "student", "--allow-nonfinite").code == 0
    assert load_file(tmp_path / "student" / SINGLE)["model.layers.2.mlp.up_proj.weight"][7, 3].isnan()


def test_keys_that_run_code_are_left_behind(t2r, hosts, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hosts("mistral"), source)
    risky = {
        "auto_map": {"AutoModelForCausalLM": "evil.Model"},
        "_attn_implementation_internal": "evil/kernel",
        "attn_implementation": "evil/kernel",
        "custom_pipelines": {"x": {"impl": "evil.P"}},
        "_name_or_path": "evil/evil",
    }
    edit_json(source / "config.json", **risky)
    answer = t2r("convert", source, tmp_path / "student")
    assert answer.code == 0, answer.err
    assert "evil" not in (tmp_path / "student" / "config.json").read_text()
    assert "auto_map" in answer.out  # named in the plan


def test_links_of_a_hub_cache_are_followed(t2r, hosts, tmp_path):
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "abc123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(hosts("mistral", "sharded").iterdir()):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert t2r("convert", snapshot, tmp_path / "student").code == 0
    assert json.loads((tmp_path / "student" / "conversion.json").read_text())["revision"] == "abc123"
    assert not any(path.is_symlink() for path in (tmp_path / "student").iterdir())
