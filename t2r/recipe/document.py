"""A YAML document that is safe to load: scanned event by event before anything is built from it.

Aliases, anchors and merge keys are refused (an alias bomb of a kilobyte expands to gigabytes), and so are tags,
duplicate keys, several documents, deep nesting and large files. The scan also learns the line of every key.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from t2r.errors import InputError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32

KeyPath = tuple[str | int, ...]
_Event = yaml.events.Event


def read_text(path: Path) -> str:
    """The text of a recipe file, at most 256 KB of UTF-8."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise InputError(f"{path}: {size} bytes; a recipe has at most {MAX_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def scan(text: str, name: str) -> dict[KeyPath, int]:
    """The line (from 1) of every key path of one YAML document.

    Args:
        text: the document.
        name: what to call it in an error, a file name for example.

    Raises:
        InputError: YAML that does not parse, or that holds what a recipe may not; every breach but a syntax error
            is told at once, a line each.
    """
    lines: dict[KeyPath, int] = {}
    problems: list[str] = []
    try:
        events = yaml.parse(text, Loader=yaml.SafeLoader)
        documents = 0
        for event in events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    problems.append(f"{name}:{_line(event)}: a second document starts; a recipe is one document")
                    break
                _node(next(events), events, (), lines, problems, name)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{where}: not valid YAML: {reason}") from None
    if problems:
        raise InputError("\n".join(problems))
    return lines


def _line(event: _Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0


def _node(
    event: _Event, events: Iterator[_Event], path: KeyPath, lines: dict[KeyPath, int], problems: list[str], name: str
) -> None:
    """Walk the node that `event` opens, adding to `lines` and `problems`."""
    lines.setdefault(path, _line(event))
    if len(path) > MAX_DEPTH:
        raise InputError(f"{name}:{_line(event)}: nested more than {MAX_DEPTH} deep")
    assert isinstance(event, yaml.NodeEvent)
    if isinstance(event, yaml.AliasEvent):
        problems.append(f"{name}:{_line(event)}: alias *{event.anchor}; a recipe has no anchors and aliases")
        return
    if event.anchor is not None:
        problems.append(f"{name}:{_line(event)}: anchor &{event.anchor}; a recipe has no anchors and aliases")
    assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent)
    if event.tag is not None:
        problems.append(f"{name}:{_line(event)}: tag {event.tag}; a recipe has no tags")
    if isinstance(event, yaml.SequenceStartEvent):
        for index, item in enumerate(iter(lambda: next(events), None)):
            if isinstance(item, yaml.SequenceEndEvent):
                return
            _node(item, events, (*path, index), lines, problems, name)
    elif isinstance(event, yaml.MappingStartEvent):
        _mapping(events, path, lines, problems, name)


def _mapping(
    events: Iterator[_Event], path: KeyPath, lines: dict[KeyPath, int], problems: list[str], name: str
) -> None:
    seen: dict[str, int] = {}
    while not isinstance(key := next(events), yaml.MappingEndEvent):
        if not isinstance(key, yaml.ScalarEvent):
            raise InputError(f"{name}:{_line(key)}: a key must be plain text")
        line = _line(key)
        if key.anchor is not None or key.tag is not None:
            problems.append(f"{name}:{line}: anchor or tag on key {key.value!r}; a recipe has neither")
        if key.value == "<<" and key.implicit[0]:
            problems.append(f"{name}:{line}: merge key <<; a recipe has no merge keys")
        if key.value in seen:
            problems.append(f"{name}:{line}: duplicate key {key.value!r}; first on line {seen[key.value]}")
        seen.setdefault(key.value, line)
        child = (*path, key.value)
        lines.setdefault(child, line)
        _node(next(events), events, child, lines, problems, name)
