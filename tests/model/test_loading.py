"""What is stored is what is loaded, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, set_seed

from t2r.errors import InputError
from t2r.model import Mixer, describe, host_config, layer_generator, load, student_config


def test_save_and_reload_is_bitwise(student, tmp_path, tokens):
    student.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(again) is type(student)
    assert again.config.mixers == student.config.mixers
    loaded = again.state_dict()
    assert set(loaded) - set(stored) <= {"lm_head.weight"}
    for name, value in stored.items():
        assert torch.equal(loaded[name], value), name
    text = tokens(1, 12)
    with torch.no_grad():
        assert torch.equal(again(text).logits, student(text).logits)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_stored_dtype_is_kept(students, mixer, tmp_path, dtype):
    from copy import deepcopy

    deepcopy(students("mistral", mixer)).to(dtype).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(torch.arange(3, 20)[None]).logits.isfinite().all()


def test_a_teacher_checkpoint_starts_the_new_parameters_alone(students, mixer, teacher_of, tmp_path):
    student = students("mistral", mixer)
    teacher = teacher_of(student)
    teacher.save_pretrained(tmp_path)
    set_seed(7)
    model = type(student).from_pretrained(tmp_path, config=student.config)
    for name, value in teacher.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for module in model.modules():
        if isinstance(module, Mixer):
            for name, value in module.initial_values(layer_generator(7, module.layer_idx)).items():
                assert torch.equal(module.get_parameter(name), value), name


def test_initial_values_are_exactly_the_new_parameters(student):
    kept = set(dict(student.named_parameters()))
    for module in student.modules():
        if isinstance(module, Mixer):
            first, second = (module.initial_values(layer_generator(3, 1)) for _ in range(2))
            assert {k: v.shape for k, v in first.items()} == {k: p.shape for k, p in module.new_parameters().items()}
            assert all(torch.equal(first[key], second[key]) for key in first)
            assert {v.dtype for v in first.values()} <= {torch.float32}
    assert all(name.startswith(("model.", "lm_head.")) for name in kept)


def test_configurations_go_there_and_back(host_configs, host, students):
    plain = host_configs[host]()
    student = student_config(plain, students(host, "layers-left-out").config.mixers)
    back = host_config(student).to_dict()
    assert back == plain.to_dict()


def test_device_map_moves_what_the_layers_need(students, mixer, tmp_path, tokens):
    """A layer on disk is run by accelerate's hooks, which move every argument of the layer's call."""
    student = students("mistral", mixer)
    student.save_pretrained(tmp_path / "model")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    layers = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(3)}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**places, **layers}, offload_folder=tmp_path / "disk"
    )
    text = tokens(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model(text).logits, student(text).logits)


def test_describe_counts_what_the_model_has(student):
    told = describe(student.config)
    assert told["parameters"]["total"] == sum(p.numel() for p in student.parameters())
    new = [p for m in student.modules() if isinstance(m, Mixer) for p in m.new_parameters().values()]
    assert told["parameters"]["mixer"] == sum({id(p): p.numel() for p in new}.values())
    with torch.no_grad():
        cache = student(torch.arange(3, 40)[None], use_cache=True).past_key_values
    layers = student.config.mixers.count(None)
    if not layers:
        assert cache.state_bytes() == told["state_bytes"]
    assert told["kv_bytes_per_token"] * 3 == told["teacher_kv_bytes_per_token"] * layers


def test_state_bytes_are_those_of_a_bfloat16_student(mistral):
    """Recurrent states stay in float32, the window's keys and values do not."""
    if None in mistral.config.mixers:
        pytest.skip("a layer keeps the host's growing cache")
    student = mistral.to(torch.bfloat16)
    student.config.dtype = torch.bfloat16
    with torch.no_grad():
        cache = student(torch.arange(3, 40)[None], use_cache=True).past_key_values
    assert cache.state_bytes() == describe(student.config)["state_bytes"]


def test_load_takes_students_and_refuses_what_is_none(students, tmp_path, embedded_teacher):
    students().save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="cannot be loaded"):  # no tokenizer
        load(tmp_path / "model")
    with pytest.raises(InputError, match="no such folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("index", "says"), [({"weight_map": {"x": "../other/model.safetensors"}}, "leaves the folder"), ([], "no index")]
)
def test_load_follows_no_index_out_of_the_folder(students, tmp_path, index, says):
    students().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=says):
        load(tmp_path)


@pytest.mark.parametrize("broken", ["truncated", "a tensor less", "another shape", "another type"])
def test_load_tells_a_broken_checkpoint_in_one_line(students, tmp_path, broken):
    students().save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    if broken == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif broken == "a tensor less":
        tensors = load_file(weights)
        del tensors["model.layers.1.self_attn.gate_bias"]
        save_file(tensors, weights, {"format": "pt"})
    else:
        size = 16 if broken == "another shape" else "many"
        config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": size}))
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_broken_mixers_field_is_told_in_one_line(students, tmp_path):
    students().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for mixers, told in (
        ([None], "one per layer"),
        (["gsa"] * 3, "must be null or a mapping"),
        ([{"name": "gza"}] * 3, "did you mean 'gsa'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, "mixers": mixers}))
        with pytest.raises(ValueError, match=told):
            AutoModelForCausalLM.from_pretrained(tmp_path)
