"""fla's checkpoints in and out. What is read must compute what fla's layers compute, written down once more in
fla_models.py from their definition; on a GPU with fla installed it is compared with fla itself."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from t2r.convert import convert
from t2r.model.mixers import parse_options
from t2r.publish import verify_manifest
from tests.convert.conftest import SIZES
from tests.convert.fla_models import CONFIGS, SLOTS, VOCABULARY, make_fla, reference_logits


@pytest.mark.parametrize(
    ("kind", "layout", "norm_eps"),
    [("gsa", "today", 1e-5), ("gsa", "merged", 1e-5), ("gsa", "today", 1e-2), ("gla", "today", 1e-2),
     ("abc", "merged", 1e-2)],
)  # fmt: skip
def test_read_checkpoint_computes_what_fla_defines(tmp_path, kind, layout, norm_eps):
    """An eps of 1e-2 tells the norms apart: fla's GSA layer keeps 1e-5 in its own."""
    source = make_fla(tmp_path / "fla", kind, layout=layout, dtype=torch.float32, norm_eps=norm_eps)
    plan = convert(source, tmp_path / "student", mixers=None, dtype=None)
    assert {t.action for t in plan.tensors} == {"copied"}
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32, trust_remote_code=False)
    ids = torch.randint(0, VOCABULARY, (70,), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = student(ids[None]).logits[0].double()
    if layout == "merged":
        source = make_fla(tmp_path / "split", kind, dtype=torch.float32)
    expected = reference_logits(kind, load_file(source / "model.safetensors"), ids, norm_eps)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("gsa", {}), ("gsa", {"norm_eps": 1e-6}), ("gla", {"norm_eps": 1e-6}), ("abc", {"norm_eps": 1e-6})],
)
def test_round_trip_is_bitwise(t2r, tmp_path, kind, changes):
    source = make_fla(tmp_path / "fla", kind, **changes)
    weights = load_file(source / "model.safetensors")
    for name in weights:  # as fla trains it: a norm in float32 beside bfloat16
        if "g_norm" in name:
            weights[name] = weights[name].float() + 1e-4
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    kept = ["--max-shard-size", "50KB", "--dtype", "source"]
    assert t2r("convert", source, tmp_path / "student", *kept).code == 0
    answer = t2r("export", tmp_path / "student", tmp_path / "back", "--format", "fla")
    assert answer.code == 0, answer.err
    assert verify_manifest(tmp_path / "back") == []
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)), name
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    common = CONFIGS[kind].keys() & written.keys()
    assert {key: written[key] for key in common} == {key: (CONFIGS[kind] | changes)[key] for key in common}
    assert CONFIGS[kind].keys() - common <= {"attn_mode", "fuse_norm", "hidden_ratio", "clamp_min", "gate_low_rank_dim"}
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    again = t2r("convert", tmp_path / "back", tmp_path / "student2", *kept)
    assert again.code == 0, again.err
    for path in (tmp_path / "student").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "student2" / path.name).read_bytes()


@pytest.mark.parametrize(
    "mixer",
    [
        {"name": "gsa", "style": "paper", "slots": 16, "norm_eps": 1e-5},
        {"name": "gla"},
        {"name": "abc", "slots": 8, "clamp": 32.0, "output_gate": True},
    ],
)
def test_a_students_own_mixer_can_be_exported(t2r, tmp_path, mixer):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4 if mixer["name"] == "abc" else 2}
    wide = mixer["name"] != "gsa"  # heads wider than hidden_size / heads
    host = MistralConfig(**SIZES | heads, head_dim=32 if wide else 16, rms_norm_eps=1e-6)
    AutoModelForCausalLM.from_config(host).save_pretrained(tmp_path / "host")
    convert(tmp_path / "host", tmp_path / "student", mixers=parse_options(mixer))
    answer = t2r("export", tmp_path / "student", tmp_path / "fla", "--format", "fla")
    assert answer.code == 0, answer.err
    found = json.loads(t2r("info", tmp_path / "fla", "--json").out)
    assert found["mixers"] == [parse_options(mixer).stored()] * 3
    assert json.loads((tmp_path / "fla" / "config.json").read_text())["norm_eps"] == 1e-6


def test_the_checkpoints_mixer_may_be_named_but_not_changed(t2r, tmp_path):
    source = make_fla(tmp_path / "fla")
    assert t2r("convert", source, "--dry-run", "--style", "paper", "--slots", SLOTS).code == 0
    answer = t2r("convert", source, "--dry-run", "--style", "paper", "--slots", SLOTS + 1)
    assert (answer.code, "has its mixer already" in answer.err) == (2, True)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gsa", {"use_short_conv": True}, "use_short_conv is True"),
        ("gsa", {"feature_map": "relu"}, "feature_map is 'relu'"),
        ("gsa", {"attn": {"layers": [0]}}, "attn is"),
        ("gsa", {"expand_k": 0.5}, "expand_k is 0.5"),
        ("gsa", {"norm_eps": -1}, "rms_norm_eps is -1"),
        ("gsa", {"num_kv_heads": 3}, "not divisible"),
        ("gsa", {"num_slots": "many"}, "slots"),
        ("gsa", {"gate_logit_normalizer": 0}, "tau"),
        ("gsa", {"num_hidden_layers": 9}, "the weights have 2 layers"),
        ("gsa", {"num_slots": 8}, "gate_proj.weight is [32, 64]"),
        ("gla", {"use_output_gate": True}, "use_output_gate is True"),
        ("gla", {"feature_map": None}, "feature_map is None"),
        ("gla", {"clamp_min": -3.0}, "clamp_min is -3.0"),
        ("gla", {"expand_k": 0.5}, "expand_k is 0.5 and expand_v 1"),
        ("gla", {"expand_k": "wide", "expand_v": "wide"}, "expand_k"),
        ("abc", {"use_rope": False}, "use_rope is False"),
        ("abc", {"clamp_min": -9}, "clamp_min is -9"),
        ("abc", {"clamp_max": "high"}, "clamp"),
        ("abc", {"use_short_conv": True}, "use_short_conv is True"),
    ],
)
def test_what_the_student_cannot_be(t2r, tmp_path, kind, changes, words):
    source = make_fla(tmp_path / "fla", kind, **changes)
    answer = t2r("convert", source, tmp_path / "student")
    assert answer.code == 2, answer
    assert words in answer.err.splitlines()[-1]
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("kind", "mixer", "words"),
    [
        ("mistral", {"name": "gsa"}, "style paper"),
        ("mistral", {"name": "retnet"}, "gla or abc"),
        ("mistral", {"name": "gsa", "style": "paper", "layers": "0"}, "in every layer"),
        ("mistral", {"name": "gsa", "style": "paper"}, "rms_norm_eps"),
        ("llama", {"name": "gsa", "style": "paper", "norm_eps": 1e-5}, "head_dim"),
        ("mistral", {"name": "gla", "gate": "pooled"}, "low-rank"),
        ("mistral", {"name": "gla", "rank": 8}, "rank is 8"),
        ("mistral", {"name": "abc"}, "output_gate"),
        ("mistral", {"name": "abc", "output_gate": True, "clamp": 32.0}, "num_key_value_heads"),
        ("qwen3", {"name": "gla"}, "norm.weight has no place"),
    ],
)
def test_what_fla_cannot_be(t2r, hosts, tmp_path, kind, mixer, words):
    convert(hosts(kind), tmp_path / "student", mixers=parse_options(mixer))
    answer = t2r("export", tmp_path / "student", tmp_path / "fla", "--format", "fla")
    assert (answer.code, words in answer.err) == (2, True), answer
    answer = t2r("export", hosts(kind), tmp_path / "fla", "--format", "fla")
    assert (answer.code, "no student" in answer.err) == (2, True)
    assert not (tmp_path / "fla").exists()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "norm_eps"), [("gsa", 1e-5), ("gsa", 1e-6), ("gla", 1e-6), ("abc", 1e-6)])
def test_logits_equal_flas_own_on_a_gpu(tmp_path, kind, norm_eps):
    """As near to the exact logits as fla's own model is, and to it as near as bfloat16 allows."""
    if not torch.cuda.is_available():
        pytest.skip("SKIPPED FOR LACK OF A GPU: fla's own logits are not compared")
    models = pytest.importorskip("fla.models", reason="SKIPPED FOR LACK OF fla: install flash-linear-attention")
    # without the fused kernels that tune themselves for a minute
    source = make_fla(tmp_path / "fla", kind, norm_eps=norm_eps, fuse_norm=False, fuse_swiglu=False)
    convert(source, tmp_path / "student", mixers=None, dtype=None)
    theirs = getattr(models, CONFIGS[kind]["architectures"][0]).from_pretrained(source, dtype=torch.bfloat16)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.bfloat16)
    # up to 64 tokens fla takes its recurrent kernels, whose chunked ones tune themselves for minutes
    ids = torch.randint(0, VOCABULARY, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        a, b = (model.cuda().eval()(ids.cuda(), use_cache=False).logits.double().cpu() for model in (ours, theirs))
    weights = load_file(source / "model.safetensors")
    exact = torch.stack([reference_logits(kind, weights, row, norm_eps) for row in ids])
    error, theirs_error = ((x - exact).norm() / exact.norm() for x in (a, b))
    print(f"{kind}, norm_eps {norm_eps}: relative error {error:.5f}, fla's {theirs_error:.5f}")
    assert theirs_error < 0.05  # else this file defines something else than fla
    assert error <= 1.5 * theirs_error
    assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + 0.02
