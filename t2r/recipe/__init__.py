"""The recipe: a whole run in one YAML file, typed, checked, and stored beside every output."""

from t2r.recipe.loader import find_recipe, load_recipe, parse_recipe
from t2r.recipe.run_folder import RunFolder, StageFolder
from t2r.recipe.schema import Recipe, dump
from t2r.recipe.stages import AlignStage, DistillStage, FinetuneStage, Stage

__all__ = [
    "AlignStage",
    "DistillStage",
    "FinetuneStage",
    "Recipe",
    "RunFolder",
    "Stage",
    "StageFolder",
    "dump",
    "find_recipe",
    "load_recipe",
    "parse_recipe",
]
