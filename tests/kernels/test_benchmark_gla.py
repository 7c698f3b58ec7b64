"""The benchmark of gla away from a GPU: the table in kernels/README.md is what the stored record renders to."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from t2r.resources import benchmarks_root

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(benchmarks_root()))
    yield importlib.import_module("gla")
    for name in ("gla", "gsa"):
        del sys.modules[name]


@pytest.fixture
def record():
    return json.loads((KERNELS / "benchmarks" / "results" / "gla-h200.json").read_text())


def test_the_readme_shows_the_stored_record(benchmark, record):
    assert benchmark.table(record) in (KERNELS / "README.md").read_text()


def test_what_fails_its_check_gets_no_time(benchmark, record):
    row = record["gates"][0]["rows"][0]
    row["fla"] = {"error": 1.0}
    shape = f"| {record['gates'][0]['gate']} | {row['batch']} x {row['length']:,} | {row['heads']} |"
    (line,) = [line for line in benchmark.table(record).split("\n") if line.startswith(shape)]
    assert line.split(" | ")[4] == "check failed"
