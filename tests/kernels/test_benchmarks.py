"""The kernels' benchmark away from a GPU: the table in kernels/README.md is what the stored record renders to."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from t2r.resources import benchmarks_root

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture
def gsa_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(benchmarks_root()))
    yield importlib.import_module("gsa")
    del sys.modules["gsa"]


def test_the_readme_shows_the_stored_record(gsa_benchmark):
    record = json.loads((KERNELS / "benchmarks" / "results" / "h200.json").read_text())
    assert gsa_benchmark.table(record) in (KERNELS / "README.md").read_text()


def test_a_kernel_that_fails_its_check_gets_no_time(gsa_benchmark):
    record = json.loads((KERNELS / "benchmarks" / "results" / "h200.json").read_text())
    record["errors"]["sdpa"] = 1.0
    for row in record["rows"]:
        del row["sdpa"]
    assert "sdpa: no time, because its check failed" in gsa_benchmark.table(record)
