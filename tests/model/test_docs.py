"""The table of docs/mixers.md is what the measurements beside it say."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def measure_mixers():
    spec = importlib.util.spec_from_file_location("measure_mixers", DOCS / "measure_mixers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_measurements(measure_mixers):
    page = (DOCS / "mixers.md").read_text()
    shown = page.split(measure_mixers.BEGIN)[1].split(measure_mixers.END)[0].strip()
    assert shown == measure_mixers.table(DOCS / "mixers"), "run: python docs/measure_mixers.py table"


def test_every_mixer_has_a_row(measure_mixers):
    from t2r.model.mixers import MIXERS

    assert {row["options"]["name"] for row in measure_mixers.ROWS.values()} == set(MIXERS)
