"""A Hub id: what is asked for, and what an answer becomes. The Hub itself is replaced by a local cache."""

import shutil
from pathlib import Path

import pytest
from huggingface_hub import hf_api, snapshot_download
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

from t2r import hub
from t2r.convert import source as checkpoints
from t2r.convert.headers import read_header
from t2r.errors import InputError
from t2r.hub import is_hub_id
from t2r.model import load

REPOSITORY = "some-org/some-model"


@pytest.fixture
def asked(hosts, tmp_path, monkeypatch) -> list[str]:
    """Put a host behind REPOSITORY; the names of the files that were downloaded are noted."""
    files: list[str] = []
    source = hosts("mistral", "sharded")

    def snapshot(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repository == REPOSITORY
        folder = tmp_path / "models--some-org--some-model" / "snapshots" / "c0ffee"
        folder.mkdir(parents=True, exist_ok=True)
        names = [*(p.name for p in source.iterdir()), "pytorch_model.bin", "modeling.py", "original/model.safetensors"]
        for name in hf_api.filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(source / name, folder / name)
            files.append(name)
        return str(folder)

    def metadata(repository: str, revision: str) -> SafetensorsRepoMetadata:
        assert revision == "c0ffee"
        found = {
            path.name: SafetensorsFileMetadata(
                metadata={},
                tensors={
                    t.name: TensorInfo(dtype=t.dtype, shape=list(t.shape), data_offsets=(t.offset, t.offset + t.nbytes))
                    for t in read_header(path).values()
                },
            )
            for path in source.glob("*.safetensors")
        }
        weight_map = {name: file for file, one in found.items() for name in one.tensors}
        return SafetensorsRepoMetadata(metadata={}, sharded=True, weight_map=weight_map, files_metadata=found)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    monkeypatch.setattr(checkpoints, "get_safetensors_metadata", metadata)
    return files


def test_dry_run_and_info_download_no_weights(t2r, asked):
    answer = t2r("convert", REPOSITORY, "--dry-run")
    assert answer.code == 0, answer.err
    assert "model.layers.0-2.mlp.up_proj.weight" in answer.out
    assert t2r("info", REPOSITORY).code == 0
    assert {"config.json", "tokenizer.json"} <= set(asked)
    assert not any(name.endswith((".safetensors", ".bin", ".py")) for name in asked)


def test_convert_downloads_weights_and_names_the_origin(t2r, asked, tmp_path):
    answer = t2r("convert", REPOSITORY, tmp_path / "student")
    assert answer.code == 0, answer.err
    assert not any(name.endswith((".bin", ".py")) or "/" in name for name in asked)
    card = (tmp_path / "student" / "README.md").read_text()
    assert f"base_model: {REPOSITORY}" in card
    assert "c0ffee" in card


def test_a_repository_without_safetensors(t2r, asked, monkeypatch):
    def refuse(*arguments: object, **options: object) -> None:
        raise NotASafetensorsRepoError("some-org/some-model is not a safetensors repo")

    monkeypatch.setattr(checkpoints, "get_safetensors_metadata", refuse)
    answer = t2r("convert", REPOSITORY, "--dry-run")
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "not a safetensors repo" in answer.err


def test_load_downloads_what_a_model_needs_and_no_more(embedded_teacher, tmp_path, monkeypatch):
    def snapshot(repository: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        names = [*(p.name for p in embedded_teacher.iterdir()), "pytorch_model.bin", "modeling.py", "onnx/model.json"]
        for name in hf_api.filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            shutil.copy(embedded_teacher / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    model, tokenizer = load(REPOSITORY)
    assert model.config.model_type == "mistral"
    assert tokenizer("a")["input_ids"]


@pytest.mark.parametrize("text", ["a/b", "mistralai/Mistral-7B-v0.1"])
def test_hub_ids(text):
    assert is_hub_id(text)


@pytest.mark.parametrize("text", ["/a/b", "./a", "../a", "a", "a/b/c", "~/a", Path("/x"), "a b/c", ""])
def test_no_hub_ids(text):
    assert not is_hub_id(text)


def test_a_mistyped_path_is_not_looked_for_on_the_hub(t2r, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    answer = t2r("info", "runs/modle")
    assert (answer.code, answer.err) == (2, "Error: runs/modle: no such folder, and not a Hub id (org/name)\n")
    with pytest.raises(InputError, match="runs/modle: no such folder, and not a Hub id"):
        load("runs/modle")


def test_a_name_that_cannot_be_reached_is_told_at_once(monkeypatch, caplog):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: snapshot_download(REPOSITORY, local_files_only=True))
    with pytest.raises(InputError, match=f"{REPOSITORY}: no such folder here, and the Hub cannot be reached"):
        load(REPOSITORY)
    assert not caplog.text
