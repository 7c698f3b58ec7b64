"""The folder of a run: what lies where, and which recipe it belongs to."""

from pathlib import Path
from typing import Any

from t2r.errors import InputError
from t2r.publish import CONFIG, verify_manifest, write_whole
from t2r.recipe.loader import parse_recipe
from t2r.recipe.schema import Recipe, dump


class StageFolder:
    """Outputs of one stage: checkpoints while it runs, its log, and its model once it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.log = path / "log.jsonl"
        self.summary = path / "stage.json"
        self.model = path / "model"
        self.adapter = path / "adapter"

    @property
    def done(self) -> bool:
        """True when the stage's model is published and every file is what its manifest says."""
        return self.model.is_dir() and self.summary.is_file() and not verify_manifest(self.model)


class RunFolder:
    """`output` of a recipe. Each part is published whole, so what is there is finished."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.path = Path(recipe.output)
        self.recipe_file = self.path / "recipe.yaml"
        self.placement = self.path / "placement.json"
        self.converted = self.path / "converted"
        self.stages = [
            StageFolder(self.path / "stages" / f"{index}-{stage.kind}") for index, stage in enumerate(recipe.stages, 1)
        ]
        self.model = self.path / "model"
        self.controls = self.path / "controls"
        self.evaluation = self.path / "evaluation"

    def check(self) -> None:
        """
        Raises:
            InputError: the folder is something else than a run's.
        """
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: output is a file; name a folder")
        if (self.path / CONFIG).exists():
            raise InputError(f"{self.path}: output is the folder of a model; name another")

    def claim(self) -> None:
        """Make the folder this recipe's: write recipe.yaml, or check that the one there would give the same models.

        Model, mixer, data, seed and the stages up to the last one begun must agree; what comes after (later stages,
        evaluation, logging) may change between runs.

        Raises:
            InputError: the folder holds another recipe's work, or is something else.
        """
        self.check()
        if self.recipe_file.is_file():
            stored = parse_recipe(self.recipe_file.read_text(), name=str(self.recipe_file))
            difference = _difference(self._settled(stored), self._settled(self.recipe))
            if difference:
                key, old, new = difference
                raise InputError(
                    f"{self.path}: holds a run of another recipe ({key} is {old!r} there, {new!r} here); "
                    f"name another output, or remove the folder"
                )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.path}: output cannot be made there ({error.strerror})") from None
        write_whole(self.recipe_file, dump(self.recipe))

    def _settled(self, recipe: Recipe) -> dict[str, Any]:
        """What the outputs already in the folder depend on."""
        full = recipe.model_dump(mode="json")
        begun = max((i for i, folder in enumerate(self.stages, 1) if folder.path.is_dir()), default=0)
        settled = {"model": full["model"], "mixer": full["mixer"], "seed": full["seed"]}
        if begun:
            settled["data"] = {key: value for key, value in full["data"].items() if key != "validation"}
            settled["stages"] = [_weights_of(stage) for stage in full["stages"][:begun]]
        return settled if begun or self.converted.is_dir() else {}


def _weights_of(stage: dict[str, Any]) -> dict[str, Any]:
    """The options of a stage that its weights depend on; how often it logs, evaluates and saves is free to change."""
    free = (
        "log_every",
        "evaluate_every",
        "evaluate_windows",
        "save_every",
        "save_total_limit",
        "gradient_checkpointing",
    )
    return {key: value for key, value in stage.items() if key not in free}


def _difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """The first key path at which two plain values differ, with both sides."""
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(name, old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(old, new, strict=True))]
    else:
        return key, old, new
    name, a, b = next(pair for pair in pairs if pair[1] != pair[2])
    return _difference(a, b, f"{key}.{name}" if key else name)
