"""Make, on a machine with network, the folder that `--offline-root` reads on a machine without."""

from collections.abc import Sequence
from pathlib import Path

from t2r_evals.cloze import context_length
from t2r_evals.errors import InputError
from t2r_evals.harness import load_tasks, task_manager
from t2r_evals.offline import offline_data
from t2r_evals.suites import TaskSpec


def make_tree(
    tasks: Sequence[TaskSpec], destination: Path, *, offline_root: Path | None = None, tasks_root: Path | None = None
) -> list[Path]:
    """Write every data set that `tasks` read: DESTINATION/org/name/{CONFIG/SPLIT.parquet, README.md}.

    The README's `configs:` block is what `datasets` reads. Configurations that are there already are left as they are.

    Args:
        offline_root: take the data from another such folder instead of the Hub.

    Returns:
        The folders written or added to.

    Raises:
        InputError: an unknown task, or data that cannot be had.
    """
    import datasets

    if offline_root is None:
        _check_hub()
    destination = Path(destination).resolve()
    manager = task_manager(tasks_root)
    wanted: dict[str, set[str | None]] = {}
    with context_length(None, 0):
        loaded = load_tasks([spec.task for spec in tasks], manager, offline_root)
    for found in loaded.values():
        for task in found["tasks"].values():
            wanted.setdefault(task.DATASET_PATH, set()).add(task.DATASET_NAME)
    written = []
    for path, names in sorted(wanted.items()):
        folder = destination / path
        if folder.resolve() == destination or not folder.resolve().is_relative_to(destination):
            raise InputError(f"tasks: data set {path!r} leaves {destination}")
        missing = [name for name in sorted(names, key=str) if not (folder / (name or "default")).is_dir()]
        if not missing and (folder / "README.md").exists():
            continue
        with offline_data(offline_root):
            for name in missing:
                for split, rows in datasets.load_dataset(path, name).items():
                    file = folder / f".{name or 'default'}.partial" / f"{split}.parquet"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    rows.to_parquet(file)
                # Renamed when whole, so that a folder of a configuration is complete.
                file.parent.rename(folder / (name or "default"))
        (folder / "README.md").write_text(_readme(folder), encoding="utf-8")
        written.append(folder)
    return written


def _check_hub() -> None:
    """One request with a short limit; the Hub's own client would retry for minutes, data set by data set."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # the client's, which changed with its versions
        raise InputError(f"no data tree can be made here: {constants.ENDPOINT} cannot be reached ({error})") from None


def _readme(folder: Path) -> str:
    lines = ["---", "configs:"]
    for config in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        lines += [f'- config_name: "{config.name}"', "  data_files:"]
        for split in sorted(config.glob("*.parquet")):
            lines += [f'  - split: "{split.stem}"', f'    path: "{config.name}/{split.name}"']
    return "\n".join([*lines, "---", ""])
