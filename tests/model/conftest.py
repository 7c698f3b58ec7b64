"""Tiny random students: the table of mixers that every property is held for, and the four hosts."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from t2r.model import HOSTS, Mixer, assign_mixers, parse_options, student_config

# To add a mixer: one row. Slots are few, so that a short text overflows them.
MIXERS = {
    "gsa-transfer": {
        "name": "gsa",
        "slots": 9,
        "sinks": 2,
        "ring": 5,
        "clock_amplitude": 2.0,
        "sink_amplitude": 3.0,
        "half_lives": (4.0, 30.0),
    },
    "gsa-heads": {"name": "gsa", "slots": [5, 11], "sinks": 2, "clock_amplitude": 2.0, "sink_amplitude": 3.0},
    "gsa-paper": {"name": "gsa", "style": "paper", "slots": 8},
    "softmax-window": {"name": "softmax", "sinks": 2, "window": 5},
    "softmax-heads": {"name": "softmax", "sinks": 2, "window": [9, 3]},
    "gla": {"name": "gla", "rank": 4},
    "gla-pooled": {"name": "gla", "gate": "pooled", "tau": 2.0},
    "retnet": {"name": "retnet"},
    "hgrn2": {"name": "hgrn2"},
    "mamba2": {"name": "mamba2"},
    "linear-elu": {"name": "linear", "map": "elu"},
    "linear-relu": {"name": "linear", "map": "relu"},
    "linear-t2r": {"name": "linear", "map": "t2r"},
    "linear-hedgehog": {"name": "linear", "map": "hedgehog"},
    "linear-supra": {"name": "linear", "map": "supra"},
    "abc": {"name": "abc", "slots": 8},
    "abc-gated": {"name": "abc", "slots": 8, "clamp": 2.0, "output_gate": True},
    "hybrid-gsa": {"name": "hybrid", "sinks": 1, "window": 4, "recurrent": {"name": "gsa", "slots": 8}},
    "hybrid-gla": {"name": "hybrid", "sinks": 1, "window": 4, "recurrent": {"name": "gla", "gate": "pooled"}},
    "one-per-layer": [
        {"name": "abc", "slots": 6, "layers": "2"},
        {"name": "softmax", "window": 3, "layers": "1"},
        {"name": "linear", "map": "elu", "layers": "0"},
    ],
    "layers-left-out": {
        "name": "gsa",
        "slots": 8,
        "clock_amplitude": 2.0,
        "sink_amplitude": 3.0,
        "layers": "all except 1",
    },
}
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
HOST_CONFIGS = {
    "mistral": lambda: MistralConfig(**SHAPE, head_dim=8, sliding_window=None),
    "mistral-sliding": lambda: MistralConfig(**SHAPE, head_dim=8, sliding_window=6),
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True),
    "qwen2": lambda: Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
}


def build(host, options, *, wild=True):
    """A student in evaluation mode. `wild` draws the new parameters at random, as training would leave them."""
    torch.manual_seed(0)
    parsed = [parse_options(one) for one in (options if isinstance(options, list) else [options])]
    config = student_config(host, assign_mixers(parsed, host.num_hidden_layers))
    model = HOSTS[host.model_type].student_causal_lm(config).eval()
    if wild:
        for module in model.modules():
            for parameter in module.new_parameters().values() if isinstance(module, Mixer) else ():
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="session")
def students():
    """students(host, mixer) -> a student of the tables above; built once, so tests that change it take a copy."""
    built = {}

    def get(host="mistral", mixer="gsa-transfer"):
        if (host, mixer) not in built:
            built[host, mixer] = build(HOST_CONFIGS[host](), MIXERS[mixer])
        return built[host, mixer]

    return get


ON_EVERY_HOST = ("gsa-transfer", "softmax-window", "layers-left-out")


@pytest.fixture(params=MIXERS)
def mixer(request):
    return request.param


@pytest.fixture
def mixer_options(mixer):
    return MIXERS[mixer]


@pytest.fixture(params=HOST_CONFIGS)
def host(request):
    return request.param


@pytest.fixture(
    params=[(h, m) for h in HOST_CONFIGS for m in MIXERS if h == "mistral" or m in ON_EVERY_HOST], ids="-".join
)
def student(students, request):
    """Every mixer on one host, and every host with some mixers."""
    return students(*request.param)


@pytest.fixture(params=ON_EVERY_HOST)
def some_mistral(students, request):
    """Some mixers, in a copy that the test may change."""
    return copy.deepcopy(students("mistral", request.param))


@pytest.fixture
def mistral(students, mixer):
    """Every mixer, in a copy that the test may change."""
    return copy.deepcopy(students("mistral", mixer))


@pytest.fixture
def build_student():
    return build


@pytest.fixture
def host_configs():
    return HOST_CONFIGS


@pytest.fixture
def teacher_of():
    """teacher_of(student) -> the host with the student's weights, whose attention is softmax everywhere."""
    from t2r.model import host_config

    def get(student):
        teacher = AutoModelForCausalLM.from_config(host_config(student.config), attn_implementation="eager").eval()
        missing, _ = teacher.load_state_dict(student.state_dict(), strict=False)
        assert not missing
        return teacher

    return get


@pytest.fixture
def tokens():
    """tokens(*shape) -> random token ids, none of them special."""

    def draw(*shape):
        return torch.randint(3, SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(2))

    return draw
