"""From a YAML file and `key=value` overrides to a Recipe, or to all that is wrong with them, a line each."""

import difflib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from t2r.errors import InputError
from t2r.recipe.document import KeyPath, read_text, scan
from t2r.recipe.schema import Recipe
from t2r.resources import recipes_root


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path that exists, or the name of a recipe that ships with t2r, ".yaml" optional."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(recipes_root().glob("*.yaml"))}
    stem = str(name).removeprefix("shipped:").removesuffix(".yaml")
    if stem in shipped:
        return shipped[stem]
    what = "is a folder" if path.is_dir() else "no such file, and no recipe of that name ships with t2r"
    raise InputError(f"{name}: {what}; {_nearest(stem, list(shipped))}")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe.

    Args:
        path: a YAML file, or the name of a shipped recipe.
        overrides: dotted `key=value` pairs, list items by index: `stages.0.lr=1e-4`.

    Raises:
        InputError: everything that is wrong with the file, a line each with its line number.
    """
    file = find_recipe(path)
    return parse_recipe(read_text(file), name=str(file), overrides=overrides)


def parse_recipe(text: str, *, name: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`, from the text of a recipe; `name` stands for the file in errors."""
    lines = scan(text, name)
    config = _build(text, name)
    origin: dict[KeyPath, str] = {path: f"{name}:{line}" for path, line in lines.items()}
    for override in overrides:
        key_path = _override(config, override)
        for depth in range(1, len(key_path)):
            origin.setdefault(key_path[:depth], f"override {override!r}")
        origin[key_path] = f"override {override!r}"
    data = OmegaConf.to_container(config, resolve=False)
    problems = [
        f"{_where(path, origin, name)}: interpolation {value!r}; a recipe has none" for path, value in _braces(data)
    ]
    if problems:
        raise InputError("\n".join(problems))
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_explain(item, data, origin, name) for item in error.errors(include_url=False)]
        raise InputError("\n".join(dict.fromkeys(problems))) from None


def _build(text: str, name: str) -> Any:
    try:
        config = OmegaConf.load(io.StringIO(text))
    except (OmegaConfBaseException, ValueError, OSError) as error:
        raise InputError(f"{name}: cannot be read: {str(error).splitlines()[0]}") from None
    if not OmegaConf.is_dict(config):
        raise InputError(f"{name}: a recipe is a mapping of keys to values")
    if not config:
        raise InputError(f"{name}: empty")
    return config


def _override(config: Any, override: str) -> KeyPath:
    """Apply one `key=value` to `config`; returns the key path it set."""
    key, equals, value = override.partition("=")
    parts = key.replace("[", ".").replace("]", "").split(".")
    if not equals or not all(parts):
        raise InputError(f"override {override!r}: write key=value, list items by index: stages.0.lr=1e-4")
    scan(f"value: {value}" if value else "value: ''", f"override {override!r}")
    node, path = config, []
    for part in parts[:-1]:
        step = _step(node, part, override)
        path.append(step)
        if OmegaConf.is_dict(node) and step not in node:
            node[step] = {}
        node = node[step]
    path.append(_step(node, parts[-1], override))
    try:
        node[path[-1]] = OmegaConf.create(f"value: {value}" if value else "value: ''").value
    except (OmegaConfBaseException, ValueError) as error:
        raise InputError(f"override {override!r}: {str(error).splitlines()[0]}") from None
    return tuple(path)


def _step(node: Any, part: str, override: str) -> str | int:
    if OmegaConf.is_list(node):
        if not part.isdecimal() or int(part) >= len(node):
            raise InputError(f"override {override!r}: {part!r} is no index of a list of {len(node)}")
        return int(part)
    if not OmegaConf.is_dict(node):
        raise InputError(f"override {override!r}: {part!r} lies below a plain value")
    return part


def _braces(data: Any, path: KeyPath = ()) -> list[tuple[KeyPath, str]]:
    """Key paths of the texts that OmegaConf would interpolate."""
    if isinstance(data, dict):
        return [hit for key, value in data.items() for hit in _braces(value, (*path, key))]
    if isinstance(data, list):
        return [hit for index, value in enumerate(data) for hit in _braces(value, (*path, index))]
    return [(path, data)] if isinstance(data, str) and "${" in data else []


def _where(path: KeyPath, origin: dict[KeyPath, str], name: str) -> str:
    """The nearest enclosing place that the file or an override names."""
    while path and path not in origin:
        path = path[:-1]
    return origin.get(path, name)


def _explain(item: Any, data: Any, origin: dict[KeyPath, str], name: str) -> str:
    """One line for one pydantic error: where it stands, which key, and the rule."""
    path, model = _locate(item["loc"], data)
    where = _where(path, origin, name)
    dotted = ".".join(map(str, path)) or "recipe"
    kind, context = item["type"], item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"{where}: {dotted}: unknown key; {_nearest(str(path[-1]), list(model.model_fields))}"
    if kind == "missing":
        return f"{where}: {dotted}: missing"
    if kind == "union_tag_not_found":
        return f"{where}: {dotted}.{context['discriminator'].strip(chr(39))}: missing"
    if kind == "union_tag_invalid":
        key, known = context["discriminator"].strip("'"), context["expected_tags"].replace("'", "").split(", ")
        return f"{where}: {dotted}.{key}: unknown {key} {context['tag']!r}; {_nearest(context['tag'], known)}"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    shown = "" if kind == "value_error" or isinstance(given, dict | list | BaseModel) else f", not {given!r}"
    return f"{where}: {dotted}: {message[0].lower() + message[1:]}{shown}"


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _locate(location: tuple[str | int, ...], data: Any) -> tuple[KeyPath, type[BaseModel]]:
    """The key path in the file of a pydantic error location, and the section it lies in.

    Pydantic adds the tag of a discriminated union, the index of a list that the user wrote as a single item, and the
    keys of a section that the user wrote as a number.
    """
    path: list[str | int] = []
    candidates: list[type[BaseModel]] = [Recipe]
    node = data
    for part in location:
        if len(candidates) > 1 and (tagged := [model for model in candidates if _tag(model) == part]):
            candidates = tagged
            continue
        if not isinstance(node, list if isinstance(part, int) else dict):
            continue
        section = candidates[0]
        path.append(part)
        if isinstance(part, str) and part in section.model_fields:
            candidates = _sections(section.model_fields[part].annotation) or candidates
        if isinstance(node, dict):
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
    return tuple(path), candidates[0]


def _tag(section: type[BaseModel]) -> str | None:
    """The literal that tells a member of a discriminated union: a stage's kind, a mixer's name."""
    for key in ("kind", "name"):
        if key in section.model_fields and (values := get_args(section.model_fields[key].annotation)):
            return values[0]
    return None


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field's annotation mentions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections(argument)]
