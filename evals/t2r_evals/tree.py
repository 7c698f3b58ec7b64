"""Make, on a machine with network, the folder that `--offline-root` reads on a machine without."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2r_evals.cloze import context_length
from t2r_evals.errors import InputError
from t2r_evals.harness import load_task, task_manager
from t2r_evals.offline import offline_data
from t2r_evals.suites import TaskSpec


def make_tree(
    tasks: Sequence[TaskSpec], destination: Path, *, offline_root: Path | None = None, tasks_root: Path | None = None
) -> list[Path]:
    """Write every data set that `tasks` read: DESTINATION/org/name/{CONFIG/SPLIT.parquet, README.md}.

    The README's `configs:` block is what `datasets` reads. Data sets that are there already are left as they are.

    Args:
        offline_root: take the data from another such folder instead of the Hub.

    Returns:
        The folders written.

    Raises:
        InputError: an unknown task, or data that cannot be had.
    """
    import datasets

    destination = Path(destination).resolve()
    manager = task_manager(tasks_root)
    wanted: dict[str, set[str | None]] = {}
    for spec in tasks:
        with context_length(None, 0):
            loaded = load_task(spec.task, manager, offline_root)
        for task in loaded["tasks"].values():
            wanted.setdefault(task.DATASET_PATH, set()).add(task.DATASET_NAME)
    written = []
    for path, names in sorted(wanted.items()):
        folder = destination / path
        if folder.resolve() == destination or not folder.resolve().is_relative_to(destination):
            raise InputError(f"tasks: data set {path!r} leaves {destination}")
        if (folder / "README.md").exists():
            continue
        configs: dict[str, Any] = {}
        with offline_data(offline_root):
            for name in sorted(names, key=str):
                configs[name or "default"] = datasets.load_dataset(path, name)
        for config, splits in configs.items():
            for split, rows in splits.items():
                file = folder / config / f"{split}.parquet"
                file.parent.mkdir(parents=True, exist_ok=True)
                rows.to_parquet(file)
        # Last, so that a folder with a README is complete.
        (folder / "README.md").write_text(_readme(configs), encoding="utf-8")
        written.append(folder)
    return written


def _readme(configs: dict[str, Any]) -> str:
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f'- config_name: "{config}"', "  data_files:"]
        for split in splits:
            lines += [f'  - split: "{split}"', f'    path: "{config}/{split}.parquet"']
    return "\n".join([*lines, "---", ""])
