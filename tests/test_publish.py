"""A folder is published whole or not at all."""

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from t2r.errors import InputError
from t2r.publish import MANIFEST, PENDING_CONFIG, publish, sha256_file, verify_manifest


def write(folder: Path, text: str = "a") -> None:
    (folder / "config.json").write_text("{}")
    (folder / "data").mkdir()
    (folder / "data" / "weights").write_text(text)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_publishes_with_a_manifest(tmp_path):
    destination = tmp_path / "new" / "folder"
    with publish(destination) as staging:
        write(staging)
        assert not destination.exists()
    assert names(destination) == {"config.json", "data", MANIFEST}
    assert names(tmp_path / "new") == {"folder"}
    assert verify_manifest(destination) == []


def test_a_failure_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with publish(tmp_path / "folder") as staging:
            write(staging)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == set()


def test_an_existing_folder_is_kept_until_its_successor_is_whole(tmp_path):
    with publish(tmp_path / "a[1]") as staging:
        write(staging, "old")
    with pytest.raises(InputError, match="--overwrite"), publish(tmp_path / "a[1]"):
        raise AssertionError("nothing may be written")
    with pytest.raises(RuntimeError), publish(tmp_path / "a[1]", overwrite=True) as staging:
        raise RuntimeError
    assert (tmp_path / "a[1]" / "data" / "weights").read_text() == "old"
    with publish(tmp_path / "a[1]", overwrite=True) as staging:
        write(staging, "new")
    assert (tmp_path / "a[1]" / "data" / "weights").read_text() == "new"
    assert names(tmp_path) == {"a[1]"}


def test_what_a_kill_left_is_removed_by_the_next_run(tmp_path):
    (tmp_path / ".a[1].partial-x").mkdir()
    with publish(tmp_path / "a[1]") as staging:
        write(staging)
    assert names(tmp_path) == {"a[1]"}
    (tmp_path / "a[1]" / "config.json").rename(tmp_path / "a[1]" / PENDING_CONFIG)
    assert verify_manifest(tmp_path / "a[1]") == [f"{tmp_path / 'a[1]' / 'config.json'}: missing"]
    with publish(tmp_path / "a[1]") as staging:
        write(staging)
    assert verify_manifest(tmp_path / "a[1]") == []


def test_known_sums_are_taken_over_and_lies_are_found(tmp_path):
    sums: dict[str, str] = {}
    with publish(tmp_path / "folder", hashes=sums) as staging:
        write(staging)
        sums["data/weights"] = "0" * 64
    assert verify_manifest(tmp_path / "folder", contents=False) == []
    assert "SHA-256 differs" in verify_manifest(tmp_path / "folder")[0]
    assert sha256_file(tmp_path / "folder" / "config.json") in (tmp_path / "folder" / MANIFEST).read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "data" / "weights").write_text("aa"), "2 bytes, manifest says 1"),
        (lambda folder: (folder / "data" / "weights").unlink(), "missing"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"../x": {"bytes": 1}}}'), "leaves the folder"),
    ],
)
def test_damage_is_named(tmp_path, change, words):
    with publish(tmp_path / "folder") as staging:
        write(staging)
    change(tmp_path / "folder")
    (problem,) = verify_manifest(tmp_path / "folder")
    assert words in problem


def killed_while_it_swaps(destination: Path) -> None:
    """In a process of its own: dies when the old destination lies aside and the new one is not in its place."""
    rename = os.rename

    def rename_and_die(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == "old":
            os.kill(os.getpid(), signal.SIGKILL)

    os.rename = rename_and_die
    with publish(destination, overwrite=True) as staging:
        write(staging, "new")


def test_what_a_kill_moved_aside_is_put_back(tmp_path):
    with publish(tmp_path / "a") as staging:
        write(staging, "old")
    process = multiprocessing.get_context("fork").Process(target=killed_while_it_swaps, args=(tmp_path / "a",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "a").exists()
    with pytest.raises(InputError, match="--overwrite"), publish(tmp_path / "a"):
        raise AssertionError("nothing may be written")
    assert (tmp_path / "a" / "data" / "weights").read_text() == "old"
    assert verify_manifest(tmp_path / "a") == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_at_once_leave_each_other_alone(tmp_path, overwrite):
    refused = contextlib.nullcontext() if overwrite else pytest.raises(InputError, match="made by someone else")
    with refused, publish(tmp_path / "a", overwrite=overwrite) as first:
        write(first, "first")
        with publish(tmp_path / "a", overwrite=overwrite) as second:
            write(second, "second")
        assert (tmp_path / "a" / "data" / "weights").read_text() == "second"
    assert (tmp_path / "a" / "data" / "weights").read_text() == ("first" if overwrite else "second")
    assert verify_manifest(tmp_path / "a") == []
    assert names(tmp_path) == {"a"}


def test_a_swap_that_fails_puts_the_old_one_back(tmp_path, monkeypatch):
    with publish(tmp_path / "a") as staging:
        write(staging, "old")
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        rename(source, target)
        if Path(target).name == "old":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), publish(tmp_path / "a", overwrite=True) as staging:
        write(staging, "new")
    assert (tmp_path / "a" / "data" / "weights").read_text() == "old"
    assert names(tmp_path) == {"a"}
