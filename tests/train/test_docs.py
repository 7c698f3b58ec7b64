"""The tables of docs/mistral-7b.md are what the measurements beside it say."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_shows_the_measurements() -> None:
    spec = importlib.util.spec_from_file_location("mistral_7b", DOCS / "mistral_7b.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "mistral-7b.md").read_text()
    assert module.written(page, module.PRICE) == page, "run: python docs/mistral_7b.py"
