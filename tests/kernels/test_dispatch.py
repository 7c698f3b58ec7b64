"""Which backend runs, and that doing without triton on a GPU is said."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from t2r_kernels import dispatch, gsa


@pytest.fixture(autouse=True)
def forget():
    dispatch.say_once.cache_clear()
    dispatch.triton_module.cache_clear()


@pytest.fixture
def on_gpu():
    with FakeTensorMode():
        return (torch.empty(2, device="cuda"),)


@pytest.fixture
def without_triton(monkeypatch):
    def fail(name):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(dispatch.importlib, "import_module", fail)


def test_auto_takes_torch_on_the_cpu_without_a_word(caplog):
    assert dispatch.choose("gsa", "auto", (torch.zeros(1),)) == "torch"
    assert not caplog.records


def test_auto_says_once_that_a_gpu_does_without_triton(on_gpu, without_triton, caplog):
    with caplog.at_level(logging.WARNING, "t2r_kernels"):
        assert dispatch.choose("gsa", "auto", on_gpu) == "torch"
        assert dispatch.choose("gsa", "auto", on_gpu) == "torch"
    assert [r.getMessage() for r in caplog.records] == [
        "gsa: torch runs instead of triton, much slower: No module named 'triton'"
    ]


def test_triton_is_never_replaced(on_gpu, without_triton):
    with pytest.raises(ValueError, match="gsa: backend='triton' cannot run: No module named 'triton'"):
        dispatch.choose("gsa", "triton", on_gpu)


def test_triton_needs_a_gpu_or_its_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="gsa: backend='triton' cannot run: tensors are on cpu and TRITON_INTERPRET=1"):
        gsa(x, x, x, x, backend="triton")


def test_auto_says_that_float64_does_without_triton(caplog):
    with FakeTensorMode(), caplog.at_level(logging.WARNING, "t2r_kernels"):
        assert dispatch.choose("gsa", "auto", (torch.empty(2, device="cuda", dtype=torch.float64),)) == "torch"
    assert "it does not compute in float64" in caplog.text
