"""Fixtures of every room. No test reaches the network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of large test material that lies beside some checkouts; what needs it is skipped elsewhere."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("SKIPPED FOR LACK OF DATA: no folder ../shared beside this checkout")
    return folder


@pytest.fixture(scope="session")
def embedded_teacher() -> Path:
    """The pretrained teacher that ships with t2r."""
    return ROOT / "recipes" / "demo" / "teacher"
