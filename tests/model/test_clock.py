"""The start of `gsa` in style transfer: the teacher's own attention over sinks and a window."""

import math

import pytest
import torch

from t2r.model import assign_mixers, parse_options
from t2r_kernels.gsa.gates import clock, written_slot

SINKS, RING = 3, 6
CLOCKED = {"name": "gsa", "slots": SINKS + RING, "sinks": SINKS, "clock_amplitude": 30.0, "sink_amplitude": 30.0}


def start_mask(length):
    """[T, T] added to the scores by the clock's start: the first S and the last R tokens are seen."""
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (key <= query) & ((key < SINKS) | (query - key < RING))
    return torch.zeros(length, length).masked_fill(~seen, -math.inf)


@pytest.mark.parametrize("name", ["mistral", "llama", "qwen2", "qwen3"])
def test_the_start_is_the_teacher_with_a_mask(name, build_student, host_configs, teacher_of, tokens):
    config = host_configs[name]()
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * 3
    student, text = build_student(config, CLOCKED, wild=False), tokens(2, 40)
    with torch.no_grad():
        expected = teacher_of(student)(text, attention_mask=start_mask(40)[None, None]).logits
        torch.testing.assert_close(student(text).logits, expected, atol=2e-5, rtol=1e-5)


def test_the_start_equals_the_softmax_mixer(build_student, host_configs, tokens):
    config = host_configs["mistral"]()
    gsa = build_student(config, CLOCKED, wild=False)
    softmax = build_student(config, {"name": "softmax", "sinks": SINKS, "window": RING}, wild=False)
    softmax.load_state_dict(gsa.state_dict(), strict=False)
    text = tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(gsa(text).logits, softmax(text).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("head", "slots"), [(0, 12), (1, 7)])
@pytest.mark.parametrize("kind", ["gsa", "softmax"])
def test_a_head_with_a_size_of_its_own_is_the_head_of_a_layer_of_that_size(
    kind, head, slots, build_student, host_configs, tokens
):
    def student(sizes):
        if kind == "gsa":
            return build_student(host_configs["mistral"](), {**CLOCKED, "slots": sizes}, wild=False)
        window = sizes - SINKS if isinstance(sizes, int) else [size - SINKS for size in sizes]
        return build_student(
            host_configs["mistral"](), {"name": "softmax", "sinks": SINKS, "window": window}, wild=False
        )

    mixed, whole = student([12, 7]), student(slots)
    own = ("self_attn.gate_proj.weight", "gate_bias", "clock_amplitude")  # which start from the sizes alone
    whole.load_state_dict({name: x for name, x in mixed.state_dict().items() if not name.endswith(own)}, strict=False)
    for model in (mixed, whole):
        for layer in model.model.layers:  # the other head's output goes nowhere
            columns = layer.self_attn.o_proj.weight.data.chunk(2, dim=1)
            columns[1 - head].zero_()
    text = tokens(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(mixed(text).logits, whole(text).logits, atol=2e-5, rtol=1e-5)


def test_softmax_mixer_equals_the_teacher_with_a_mask(build_student, host_configs, teacher_of, tokens):
    student = build_student(host_configs["mistral"](), {"name": "softmax", "sinks": SINKS, "window": RING})
    text = tokens(2, 40)
    with torch.no_grad():
        expected = teacher_of(student)(text, attention_mask=start_mask(40)[None, None]).logits
        torch.testing.assert_close(student(text).logits, expected, atol=2e-5, rtol=1e-5)


def test_softmax_without_a_window_is_the_teacher_bit_for_bit(build_student, host_configs, teacher_of, host, tokens):
    student, text = build_student(host_configs[host](), {"name": "softmax"}), tokens(2, 30)
    teacher = teacher_of(student)
    student.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(student(text).logits, teacher(text).logits)
    assert student.config.mixers == [None] * 3


def test_clock_by_hand():
    position = torch.tensor([[0, 1, 2, 3, 4, 5]])
    assert written_slot(position, 2, 2).tolist() == [[0, 1, 2, 3, 2, 3]]
    assert written_slot(position, 2, 0).tolist() == [[0, 1, 2, 2, 2, 2]]
    assert clock(position, 5, 2, 2)[0, 4].tolist() == [1, 1, -1, 1, 0]
    assert clock(position, 3, 2, 0)[0, 3].tolist() == [1, 1, 0]


def test_long_lived_slots_start_at_their_half_lives(build_student, host_configs):
    options = {"name": "gsa", "slots": 8, "sinks": 1, "ring": 4, "half_lives": (10.0, 1000.0)}
    mixer = build_student(host_configs["mistral"](), options, wild=False).model.layers[0].self_attn
    alpha = mixer.gate_bias[0, 5:].double().sigmoid()
    torch.testing.assert_close(alpha, 0.5 ** (1 / torch.tensor([10.0, 100.0, 1000.0]).double()), atol=1e-7, rtol=0)
    assert assign_mixers(parse_options(options), 1)[0]["ring"] == 4
