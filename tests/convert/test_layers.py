"""A mixer of its own for every layer: the command line and a recipe say the same."""

import json

import pytest

from t2r.convert import convert
from t2r.recipe import load_recipe


@pytest.mark.parametrize(
    ("options", "mixer"),
    [
        (["--place", "none", "--layers", "all except 2,4"], "{name: gsa, layers: 'all except 2,4'}"),
        (["--mixer", "gla", "--set", "gate=pooled", "--layers", "3"], "{name: gla, gate: pooled, layers: 3}"),
        (
            ["--mixer", "softmax", "--set", "window=12", "--set", "sinks=2", "--layers", "0-1,5"],
            "{name: softmax, window: 12, sinks: 2, layers: '0-1,5'}",
        ),
        (["--style", "paper", "--slots", "16", "--set", "norm_eps=1e-6"],
         "{name: gsa, style: paper, slots: 16, norm_eps: 1e-6}"),
    ],
)  # fmt: skip
def test_the_command_line_and_a_recipe_agree(t2r, embedded_teacher, tmp_path, options, mixer):
    answer = t2r("convert", embedded_teacher, tmp_path / "line", *options)
    assert answer.code == 0, answer.err
    recipe = load_recipe("demo", [f"mixer={mixer}", f"output={tmp_path}"])
    convert(embedded_teacher, tmp_path / "recipe", mixers=recipe.mixer)
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("line", "recipe"))
    assert first == second
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("line", "recipe")]
    assert weights[0] == weights[1]


def test_a_recipe_gives_layers_different_mixers(t2r, embedded_teacher, tmp_path):
    mixer = "[{name: abc, slots: 8, layers: 0}, {name: hybrid, layers: '1-2'}, {name: linear, map: supra, layers: 4}]"
    recipe = load_recipe("demo", [f"mixer={mixer}", f"output={tmp_path}"])
    convert(embedded_teacher, tmp_path / "student", mixers=recipe.mixer)
    layers = json.loads(t2r("info", tmp_path / "student", "--json").out)["layers"]
    assert layers == ["abc", "hybrid", "hybrid", "softmax (host)", "linear", "softmax (host)"]
