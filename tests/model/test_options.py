"""Mixers' options and the layers they are for."""

import json

import pytest

from t2r.errors import InputError
from t2r.model import assign_mixers, parse_layers, parse_options, student_config


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "None is none of"),
        ({"name": ["gsa"]}, "is none of"),
        ({"name": "gza"}, "did you mean 'gsa'"),
        ({"name": "gsa", "slotz": 3}, "did you mean 'slots'"),
        ({"name": "gsa", "slots": 0}, "slots"),
        ({"name": "gsa", "slots": "many"}, "slots"),
        ({"name": "gsa", "slots": []}, "slots"),
        ({"name": "gsa", "slots": [8, "9"]}, "slots.1: Input should be a valid integer"),
        ({"name": "gsa", "slots": [8, 3]}, "at most slots 3"),
        ({"name": "gsa", "slots": [8, 9], "ring": 4}, "ring: where slots is a list"),
        ({"name": "gsa", "slots": [8, 9], "style": "paper"}, "style paper has the same number"),
        ({"name": "softmax", "window": [8, 0]}, "window.1"),
        ({"name": "gsa", "slots": 8, "sinks": 9}, "at most slots 8"),
        ({"name": "gsa", "slots": 8, "ring": 6}, "at most slots 8"),
        ({"name": "gsa", "style": "paper", "sinks": 4}, "not an option of style paper"),
        ({"name": "gsa", "tau": 4}, "not an option of style transfer"),
        ({"name": "gsa", "clock_amplitude": float("nan")}, "clock_amplitude"),
        ({"name": "gsa", "half_lives": [9, 3]}, "half_lives"),
        ({"name": "softmax", "sinks": 2}, "needs a window"),
        ({"name": "gsa", "norm_eps": 1e-5}, "not an option of style transfer"),
        ({"name": "gsa", "style": "paper", "norm_eps": 0}, "norm_eps"),
        ({"name": "gsa", "slots": True}, "slots: Input should be a valid integer, not True"),
        ({"name": "gsa", "slots": "16"}, "slots: Input should be a valid integer"),
        ({"name": "gsa", "slots": 16.0}, "slots: Input should be a valid integer"),
        ({"name": "gsa", "clock_amplitude": True}, "clock_amplitude: Input should be a valid number"),
        ({"name": "gsa", "clock_amplitude": "8"}, "clock_amplitude: Input should be a valid number"),
        ({"name": "gsa", "half_lives": ["3", "9"]}, "half_lives.0: Input should be a valid number"),
        (
            {"name": "hybrid", "recurrent": {"name": "gsa", "slots": "8"}},
            "slots: Input should be a valid integer",
        ),
        ({"name": "hybrid", "recurrent": {"name": "gla", "layers": "1"}}, "the hybrid's own layers"),
        ({"name": "gsa", "layers": True}, "layers: Input should be a valid string"),
    ],
)
def test_bad_options_are_told_in_one_line(options, told):
    with pytest.raises(InputError, match=told) as caught:
        parse_options(options)
    assert "\n" not in str(caught.value)


def test_a_list_of_slots_is_one_for_each_key_value_head(build_student, host_configs):
    options = {"name": "gsa", "slots": [8, 9, 8]}
    assert parse_options(options).stored()["slots"] == [8, 9, 8]
    with pytest.raises(InputError, match="gsa: slots: 3 numbers, must be one for each of 2 key/value heads"):
        build_student(host_configs["mistral"](), options)


def test_whole_numbers_stand_for_floats_and_lists_for_tuples():
    stored = parse_options({"name": "gsa", "clock_amplitude": 4, "half_lives": [3, 9], "layers": 2}).stored()
    assert (stored["clock_amplitude"], stored["half_lives"]) == (4.0, [3.0, 9.0])
    assert parse_options(json.loads(json.dumps(stored))).stored() == stored
    assert assign_mixers(parse_options({"name": "retnet", "layers": 2}), 3)[:2] == [None, None]


def test_stored_options_are_complete_and_stable(students, mixer):
    for entry in students("mistral", mixer).config.mixers:
        if entry is not None:
            assert parse_options(entry).stored() == entry


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("0,2,4-5", [0, 2, 4, 5]),
        (" 3 , 1 - 2", [1, 2, 3]),
        ("all except 2,5", [0, 1, 3, 4]),
        ("all except 0-5", []),
    ],
)
def test_layers(text, layers):
    assert parse_layers(text, 6) == layers


@pytest.mark.parametrize("text", ["", "6", "2-1", "a", "1;2", "-1", "all but 1", "all except 9", "1,"])
def test_bad_layers(text):
    with pytest.raises(InputError, match="layers"):
        parse_layers(text, 6)


def test_layers_may_have_different_mixers_but_not_two():
    gsa, softmax = parse_options({"name": "gsa", "layers": "0"}), {"name": "softmax", "sinks": 1, "window": 4}
    entries = assign_mixers([gsa, parse_options({**softmax, "layers": "2-3"})], 4)
    assert [entry and entry["name"] for entry in entries] == ["gsa", None, "softmax", "softmax"]
    assert "layers" not in entries[0]
    with pytest.raises(InputError, match="layer 0 is given to both"):
        assign_mixers([gsa, parse_options(softmax)], 4)


def test_impossible_hosts_are_refused(host_configs):
    from transformers import GPT2Config

    config = host_configs["mistral"]()
    with pytest.raises(InputError, match="mistral, llama, qwen2, qwen3"):
        student_config(GPT2Config(), [])
    config.num_key_value_heads = 3
    with pytest.raises(InputError, match="not a multiple"):
        student_config(config, [None] * 3)
    config.num_key_value_heads = -1
    with pytest.raises(InputError, match="positive"):
        student_config(config, [None] * 3)
