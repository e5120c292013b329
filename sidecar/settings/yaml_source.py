"""YAML text to plain data, with the line of every value kept and environment variables filled in.

Every scalar stays text (or None): YAML's own guesses, by which `on` becomes a boolean and `1:30` ninety, are left out,
and the key that a value belongs to decides its type later. Variables are filled in after the structure is known, so
what stands in the environment can never become a key or a list. Hostile text is bounded in size, depth and number of
values. Knows no key of any file.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import yaml

from sidecar.settings.problems import Path, Problem, dotted

LARGEST_FILE = 2**20  # bytes; a thousand rules take a third of it
DEEPEST = 32  # levels; our own files need eight
MOST_VALUES = 100_000  # after aliases are followed: a few lines of them can otherwise stand for billions
MOST_CHARACTERS = 8 * 2**20  # after variables are filled in, for the same reason

_Loader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # libyaml where PyYAML has it: twenty times faster

_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_YAML = "tag:yaml.org,2002:"
_SCALAR_TAGS = frozenset({None, "!", *(_YAML + name for name in ("str", "int", "float", "bool", "null"))})
_MAPPING_TAGS = frozenset({None, "!", _YAML + "map"})
_SEQUENCE_TAGS = frozenset({None, "!", _YAML + "seq"})

_REFERENCE = re.compile(r"\$\$\{|\$\{(?:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^{}]*))?\})?")


class Unreadable:
    """Stands in the data for a value that was already reported, so that nobody takes it for something else."""

    def __repr__(self) -> str:
        return "(unreadable)"


UNREADABLE = Unreadable()


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """What one file says.

    Attributes:
        file: its path, for reports.
        data: dict, list, str, None (nothing, or a YAML null) or UNREADABLE.
        problems: what is wrong with it as YAML: syntax, doubled keys, variables that are not set.
        digest: SHA-256 hex of the text and of the variables that were filled in.
    """

    file: str
    data: Any
    problems: tuple[Problem, ...]
    digest: str
    _lines: Mapping[Path, int]
    _reported: frozenset[Path]

    def line(self, path: Path) -> int:
        """The line of a value (of its key, where it has one), or of the nearest thing around it that was written."""
        for length in range(len(path), -1, -1):
            if path[:length] in self._lines:
                return self._lines[path[:length]]
        return 1

    def problem(self, path: Path, reason: str) -> Problem:
        """Make a problem of this file."""
        return Problem(file=self.file, line=self.line(path), key=dotted(path), reason=reason)

    def already_reported(self, path: Path) -> bool:
        """Whether `problems` explains this value, so that a complaint about its type would only distract."""
        return path in self._reported


def read_file(path: FilePath, environ: Mapping[str, str], *, name: str | None = None) -> Document:
    """Read one YAML file; whatever is wrong, also that it cannot be opened, is in the document's problems.

    Args:
        path: the file.
        environ: where `${VAR}` is looked up.
        name: how reports call the file; its path by default.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        return _failed(name, 1, f"cannot be read: {error.strerror or error}")
    if len(raw) > LARGEST_FILE:
        return _failed(name, 1, f"is larger than {LARGEST_FILE // 2**20} MiB; split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return _failed(name, line, f"is not UTF-8: byte 0x{raw[error.start]:02x}")
    return read_text(text, environ, name=name)


def read_text(text: str, environ: Mapping[str, str], *, name: str) -> Document:
    """Read YAML text, as `read_file` does; the caller bounds its size."""
    try:
        root = _Composer(text).document()
    except _Unusable as error:
        return _failed(name, error.line, error.reason, text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        return _failed(name, line, f"is not valid YAML: {error.problem}{_syntax_hint(text, line)}", text)
    except yaml.YAMLError as error:  # characters that YAML forbids
        return _failed(name, 1, f"is not valid YAML: {' '.join(str(error).split())}", text)
    expansion = _Expansion(name, environ)
    try:
        data = expansion.data_of(root, ()) if root else None
    except _Unusable as error:
        return _failed(name, error.line, error.reason, text)
    return Document(
        file=name,
        data=data,
        problems=tuple(expansion.problems),
        digest=_digest(text, expansion.variables),
        _lines=expansion.lines,
        _reported=frozenset(expansion.reported),
    )


def _failed(name: str, line: int, reason: str, text: str = "") -> Document:
    problem = Problem(file=name, line=line, key=dotted(()), reason=reason)
    return Document(
        file=name,
        data=UNREADABLE,
        problems=(problem,),
        digest=_digest(text, {}),
        _lines={},
        _reported=frozenset({()}),
    )


def _digest(text: str, variables: Mapping[str, str | None]) -> str:
    return hashlib.sha256(repr((text, sorted(variables.items(), key=repr))).encode()).hexdigest()


def _syntax_hint(text: str, number: int) -> str:
    """Explain the two mistakes that YAML's own message hides: an unquoted operator and an unquoted `${VAR}`."""
    # libyaml places some errors on the line after the one that causes them.
    for line in reversed(text.splitlines()[max(number - 2, 0) : number]):
        if re.search(r"operator:\s*[>!]", line):
            return "; write the operator in quotes, '>=', or as a word, ge"
        if re.search(r"[\[{,:]\s*\$\{", line):
            return '; inside { } and [ ] write a variable in quotes, "${NAME}"'
    return ""


class _Unusable(Exception):  # noqa: N818 - never leaves this module
    """The document as a whole cannot be used."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scalar:
    line: int
    text: str
    is_null: bool  # where nothing is filled in; what a variable leaves empty is decided later
    plain: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sequence:
    line: int
    items: tuple["_Node", ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mapping:
    line: int
    entries: tuple[tuple[_Scalar, "_Node"], ...]


_Node = _Scalar | _Sequence | _Mapping


class _Composer:
    """Parser events to nodes, keeping to what a configuration file needs: plain tags, text keys, one document."""

    def __init__(self, text: str) -> None:
        self._events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self._anchors: dict[str, _Node] = {}

    def document(self) -> _Node | None:
        root: _Node | None = None
        seen = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                seen += 1
                if seen > 1:
                    raise _Unusable(_line(event), "holds a second document; write one document a file")
            elif isinstance(event, yaml.NodeEvent):
                root = self._node(event, depth=1)
        return root

    def _node(self, event: Any, depth: int) -> _Node:
        if depth > DEEPEST:
            raise _Unusable(_line(event), f"is nested deeper than {DEEPEST} levels")
        if isinstance(event, yaml.AliasEvent):
            known = self._anchors.get(str(event.anchor))
            if known is None:
                raise _Unusable(_line(event), f"alias *{event.anchor} has no finished anchor before it")
            return known
        node = self._collection_or_scalar(event, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _collection_or_scalar(self, event: Any, depth: int) -> _Node:
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            _check_tag(event, _SEQUENCE_TAGS)
            return _Sequence(line=_line(event), items=tuple(self._children(yaml.SequenceEndEvent, depth)))
        _check_tag(event, _MAPPING_TAGS)
        children = list(self._children(yaml.MappingEndEvent, depth))
        entries = tuple((_key(key), value) for key, value in zip(children[::2], children[1::2], strict=True))
        return _Mapping(line=_line(event), entries=entries)

    def _children(self, end: type, depth: int) -> Iterator[_Node]:
        for event in self._events:
            if isinstance(event, end):
                return
            yield self._node(event, depth + 1)


def _scalar(event: Any) -> _Scalar:
    _check_tag(event, _SCALAR_TAGS)
    plain = event.style is None or event.style == ""
    untagged = event.tag is None
    is_null = event.tag == _YAML + "null" or (plain and untagged and event.value in _NULLS)
    return _Scalar(line=_line(event), text=event.value, is_null=is_null, plain=plain and untagged)


def _key(node: _Node) -> _Scalar:
    if not isinstance(node, _Scalar):
        raise _Unusable(node.line, "has a key that is a list or a mapping; keys are text")
    if "${" in node.text:
        raise _Unusable(node.line, f"has a variable in the key {node.text!r}; variables are filled into values only")
    return node


def _check_tag(event: Any, allowed: frozenset[str | None]) -> None:
    if event.tag not in allowed:
        tag = event.tag.replace(_YAML, "!!")
        raise _Unusable(
            _line(event), f"has the tag {tag!r}, which is not allowed; text that begins with ! needs quotes"
        )


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


@dataclass(kw_only=False)
class _Expansion:
    """Nodes to data: aliases followed, merges done, variables filled in, all of it counted."""

    file: str
    environ: Mapping[str, str]
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    reported: set[Path] = field(default_factory=set)
    variables: dict[str, str | None] = field(default_factory=dict)
    _values: int = 0
    _characters: int = 0

    def data_of(self, node: _Node, path: Path) -> Any:
        self._values += 1
        if self._values > MOST_VALUES or len(path) > DEEPEST:
            raise _Unusable(node.line, f"stands for more than {MOST_VALUES} values or {DEEPEST} levels")
        self.lines.setdefault(path, node.line)
        if isinstance(node, _Scalar):
            return self._text_of(node, path)
        if isinstance(node, _Sequence):
            return [self.data_of(item, (*path, index)) for index, item in enumerate(node.items)]
        return self._mapping_of(node, path)

    def _mapping_of(self, node: _Mapping, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        written: dict[str, int] = {}
        for key, value in node.entries:
            if key.plain and key.text == "<<":
                continue
            here = (*path, key.text)
            if key.text in written:
                self._report(here, key.line, f"is written twice; first on line {written[key.text]}")
                continue
            written[key.text] = key.line
            self.lines[here] = key.line
            data[key.text] = self.data_of(value, here)
        for key, value in node.entries:
            if key.plain and key.text == "<<":
                self._merge(data, value, path)
        return data

    def _merge(self, data: dict[str, Any], value: _Node, path: Path) -> None:
        """Add what a merge key brings in; a key that stands in the mapping itself, or was merged earlier, wins."""
        sources = value.items if isinstance(value, _Sequence) else (value,)
        for source in sources:
            if not isinstance(source, _Mapping):
                raise _Unusable(source.line, "merges something that is not a mapping with <<")
            kept = _Mapping(line=source.line, entries=tuple(e for e in source.entries if e[0].text not in data))
            data.update(self._mapping_of(kept, path))

    def _text_of(self, node: _Scalar, path: Path) -> Any:
        if "${" not in node.text:
            return None if node.is_null else node.text
        faults: list[str] = []
        text = _REFERENCE.sub(lambda match: self._value_of(match, faults), node.text)
        if faults:
            self._report(path, self.lines[path], "; ".join(dict.fromkeys(faults)))
            return UNREADABLE
        self._characters += len(text)
        if self._characters > MOST_CHARACTERS:
            raise _Unusable(node.line, f"grows beyond {MOST_CHARACTERS // 2**20} MiB when variables are filled in")
        return None if node.plain and text in _NULLS else text

    def _value_of(self, match: re.Match[str], faults: list[str]) -> str:
        if match[0] == "$${":
            return "${"
        name = match["name"]
        if name is None:
            faults.append("holds '${' without a variable; write ${NAME} or ${NAME:-default}, or $${ for a literal ${")
            return ""
        value = self.variables[name] = self.environ.get(name)
        if match["default"] is not None:
            return value or match["default"]
        if value is None:
            faults.append(f"environment variable {name} is not set; set it, or write ${{{name}:-default}}")
        return value or ""

    def _report(self, path: Path, line: int, reason: str) -> None:
        self.problems.append(Problem(file=self.file, line=line, key=dotted(path), reason=reason))
        self.reported.add(path)
