"""A conversion keeps what it says it keeps, adds what it says it adds, and loads."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import t2r.model  # noqa: F401
from t2r.convert import convert, make_plan
from t2r.convert.plan import parse_size
from t2r.errors import InputError
from t2r.model.mixers import MIXERS, parse_options
from t2r.publish import verify_manifest
from tests.convert.conftest import EXTRA_FILES, HOST_CONFIGS

GSA = parse_options({"name": "gsa", "slots": 8, "sinks": 2})
SOFTMAX = parse_options({"name": "softmax"})
KINDS = tuple(HOST_CONFIGS)


def load(folder: Path, **kwargs: object) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **kwargs).eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


@pytest.mark.parametrize("layout", ["single", "sharded"])
@pytest.mark.parametrize("kind", KINDS)
def test_gsa_student_holds_the_host_bit_for_bit(hosts, tmp_path, kind, layout):
    source = hosts(kind, layout)
    plan = convert(source, tmp_path / "student", mixers=GSA, dtype=None, max_shard_size="50KB")
    assert verify_manifest(tmp_path / "student") == []
    assert len(plan.shards) > 1

    before, after = stored(source), stored(tmp_path / "student")
    new = {t.name for t in plan.tensors if t.action == "new"}
    assert set(after) - set(before) == new
    assert set(before) - set(after) == set()
    assert len(new) == 3 * 3
    for name, value in before.items():
        assert torch.equal(value, after[name]), name

    # what from_pretrained gives is what the files hold: nothing is initialised over
    model = load(tmp_path / "student", dtype=torch.float32)
    for name, value in model.state_dict().items():
        expected = after["model.embed_tokens.weight" if name not in after else name]
        assert torch.equal(value, expected), name
    assert type(model).__name__.startswith("T2R")
    assert model(torch.arange(40)[None]).logits.isfinite().all()


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_converts_and_loads_bit_for_bit(hosts, tmp_path, name):
    """The default options of each mixer; nothing of the file is initialised over, every new tensor is finite."""
    plan = convert(hosts("qwen3"), tmp_path / "student", mixers=parse_options({"name": name}), dtype=None)
    after = stored(tmp_path / "student")
    assert {t.name for t in plan.tensors} == set(after)
    assert all(x.isfinite().all() for x in after.values())
    for key, value in load(tmp_path / "student", dtype=torch.float32).state_dict().items():
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_softmax_student_gives_the_teachers_logits(hosts, tmp_path, kind):
    convert(hosts(kind), tmp_path / "student", mixers=SOFTMAX, dtype=None)
    ids = torch.randint(0, 96, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "student")(ids).logits, load(hosts(kind))(ids).logits)


def test_cast_equals_torchs_and_is_the_default(hosts, tmp_path):
    source = hosts("mistral")
    plan = convert(source, tmp_path / "student", mixers=GSA)
    after = stored(tmp_path / "student")
    for name, value in stored(source).items():
        assert torch.equal(value.to(torch.bfloat16), after[name]), name
    assert {x.dtype for x in after.values()} == {torch.bfloat16}
    assert {t.action for t in plan.tensors} == {"transformed", "new"}
    assert load(tmp_path / "student", dtype="auto").dtype == torch.bfloat16


def test_layers_left_out_keep_the_hosts_attention(hosts, tmp_path):
    mixers = [
        parse_options({"name": "gsa", "layers": "0"}),
        parse_options({"name": "softmax", "window": 8, "layers": "2"}),
    ]
    convert(hosts("llama"), tmp_path / "student", mixers=mixers)
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert [m and m["name"] for m in config["mixers"]] == ["gsa", None, "softmax"]


def test_equal_arguments_give_equal_bytes_and_the_seed_matters(hosts, tmp_path):
    paper = parse_options({"name": "gsa", "style": "paper", "slots": 8})
    sums = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        convert(hosts("qwen3"), tmp_path / name, mixers=paper, seed=seed)
        sums.append(json.loads((tmp_path / name / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"])
    assert sums[0] == sums[1] != sums[2]


def test_folder_carries_tokenizer_licence_card_and_record(hosts, tmp_path):
    out = tmp_path / "student"
    convert(hosts("mistral"), out, mixers=GSA, command=["t2r", "convert", "a b", "student"])
    for name in set(EXTRA_FILES) - {"README.md"}:
        assert (out / name).read_bytes() == EXTRA_FILES[name].encode(), name
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "auto:" not in card
    assert "t2r convert 'a b' student" in card
    record = json.loads((out / "conversion.json").read_text())
    assert record["seed"] == 0
    assert {"t2r", "torch", "transformers"} <= set(record["versions"])
    assert record["parameters_after"] == sum(x.numel() for x in stored(out).values())
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in out.iterdir())


def test_record_accounts_for_every_tensor(hosts):
    plan = make_plan(str(hosts("qwen2", "sharded")), GSA)
    record = plan.to_json()
    assert (
        sum(record["tensors_by_action"].values())
        == len(record["tensors"])
        == len({t["name"] for t in record["tensors"]})
    )
    assert record["bytes_after"] == sum(t["bytes"] for t in record["tensors"] if t["action"] != "dropped")


def test_files_are_good_in_the_eyes_of_the_safetensors_library(hosts, tmp_path):
    convert(hosts("mistral"), tmp_path / "student", mixers=GSA, max_shard_size="50KB")
    index = json.loads((tmp_path / "student" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "student" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert name in opened.keys()  # noqa: SIM118  (no mapping)


def test_mixed_dtypes_stay_aligned(hosts, tmp_path):
    source = tmp_path / "host"
    model = AutoModelForCausalLM.from_pretrained(hosts("mistral"), dtype=torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(source)
    plan = convert(source, tmp_path / "student", mixers=SOFTMAX, dtype=None)
    assert [t.dtype for t in plan.tensors][:2] == ["F32", "BF16"]
    assert stored(tmp_path / "student")["model.norm.weight"].dtype == torch.float32


def test_old_rotary_buffers_and_a_tied_head_are_dropped_by_name(hosts, tmp_path):
    from safetensors.torch import save_file

    source = tmp_path / "host"
    load(hosts("qwen2")).save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    plan = convert(source, tmp_path / "student", mixers=GSA)
    assert {t.name: t.note for t in plan.dropped} == {
        "lm_head.weight": "tied to model.embed_tokens.weight",
        "model.layers.1.self_attn.rotary_emb.inv_freq": "recomputed from the configuration",
    }
    assert not {t.name for t in plan.dropped} & set(stored(tmp_path / "student"))

    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        convert(source, tmp_path / "other", mixers=GSA)


def test_embedded_teacher(embedded_teacher, tmp_path):
    if not (embedded_teacher / "config.json").is_file():
        pytest.skip("SKIPPED FOR LACK OF DATA: no embedded teacher in recipes/demo/teacher")
    convert(embedded_teacher, tmp_path / "student", mixers=SOFTMAX, dtype=None)
    ids = torch.arange(5, 105)[None]
    with torch.no_grad():
        ours = load(tmp_path / "student", dtype=torch.float32)(ids).logits
        torch.testing.assert_close(ours, load(embedded_teacher, dtype=torch.float32)(ids).logits)


@pytest.mark.parametrize(("text", "nbytes"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), (700, 700), ("2T", 2 * 10**12)])
def test_sizes(text, nbytes):
    assert parse_size(text) == nbytes


class TestCommandLine:
    def test_dry_run_prints_every_tensor_and_writes_nothing(self, t2r, hosts, tmp_path):
        answer = t2r("convert", hosts("mistral"), tmp_path / "student", "--dry-run")
        assert answer.code == 0
        for text in (
            "model.layers.0-2.self_attn.q_proj.weight",
            "gate_proj.weight",
            "new",
            "transformed",
            "state per seq",
        ):
            assert text in answer.out, text
        assert list(tmp_path.iterdir()) == []

    def test_json_names_every_tensor(self, t2r, hosts):
        answer = t2r("convert", hosts("mistral"), "--dry-run", "--json", "--slots", 16, "--set", "sinks=2")
        plan = json.loads(answer.out)
        assert plan["mixers"][0]["slots"] == 16
        assert plan["mixers"][0]["ring"] == 14
        assert "model.layers.2.self_attn.gate_proj.weight" in {t["name"] for t in plan["tensors"]}

    def test_converts_and_replaces_only_its_own_output(self, t2r, hosts, tmp_path):
        out = tmp_path / "student"
        assert t2r("convert", hosts("mistral"), out, "--layers", "all except 1").code == 0
        assert verify_manifest(out) == []
        assert "already exists" in t2r("convert", hosts("mistral"), out).err
        assert t2r("convert", hosts("llama"), out, "--overwrite").code == 0
        assert json.loads((out / "config.json").read_text())["model_type"] == "t2r_llama"
        assert [path.name for path in tmp_path.iterdir()] == ["student"]
        (out / "manifest.json").unlink()
        answer = t2r("convert", hosts("llama"), out, "--overwrite")
        assert answer.code == 2
        assert "t2r did not write it" in answer.err
