"""Slots that a recipe has shared out among the heads before the conversion."""

import json

import pytest

from t2r.cli import place
from t2r.cli.run import prepare
from t2r.errors import InputError
from t2r.recipe import RunFolder, load_recipe

SMALL = ("mixer={name: gsa, slots: 24, layers: 3-5}", "place={windows: 1, window: 160}")


def recipe(tmp_path, *overrides):
    return load_recipe("demo", [*SMALL, f"output={tmp_path / 'run'}", *overrides])


def test_the_run_is_the_placed_recipes_and_goes_on_with_what_was_measured(tmp_path, monkeypatch, capsys):
    asked = recipe(tmp_path)
    found = place.placed(asked)
    assert "slots by layer: softmax  softmax  softmax  " in capsys.readouterr().err
    slots = [mixer.slots if isinstance(mixer.slots, tuple) else (mixer.slots,) * 2 for mixer in found.mixer]
    assert {mixer.layers for mixer in found.mixer} <= {"3", "4", "5", "3,4", "4,5", "3,5"}
    assert sum(map(sum, slots)) <= 24 * 2 * 3
    assert len({number for both in slots for number in both}) > 1
    assert found.place.windows == 0
    folder = RunFolder(found)
    prepare(found, folder)
    assert load_recipe(folder.recipe_file) == found
    entries = json.loads((folder.converted / "config.json").read_text())["mixers"]
    assert [entry and entry["name"] for entry in entries] == [None] * 3 + ["gsa"] * 3

    monkeypatch.setattr(place, "_measure", lambda recipe: pytest.fail("measured again"))
    assert place.placed(asked) == found
    prepare(place.placed(asked), folder)
    assert place.placed(recipe(tmp_path, "stages.0.lr=1e-5")).mixer == found.mixer
    with pytest.raises(InputError, match=r"placement\.json: of another recipe"):
        place.placed(recipe(tmp_path, "mixer.slots=32"))


def test_without_the_section_the_recipe_stays_as_it_is(tmp_path):
    asked = recipe(tmp_path, "place.windows=0")
    assert place.placed(asked) is asked
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mixer", "told"),
    [
        ("{name: gla}", "mixer gla has none to place"),
        ("{name: gsa, slots: [24, 32]}", r"the slots \[24, 32\] are one for each head already"),
        ("{name: gsa, style: paper}", "only gsa of style transfer"),
        ("[{name: gsa, layers: 0}, {name: gsa, layers: 1}]", "slots are placed for one mixer, not for 2"),
    ],
)
def test_what_cannot_be_placed_is_told_before_anything_is_loaded(tmp_path, monkeypatch, mixer, told):
    monkeypatch.setattr("t2r.model.load", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(InputError, match=told) as caught:
        place.placed(recipe(tmp_path, f"mixer={mixer}"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
