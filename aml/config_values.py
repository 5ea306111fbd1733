"""How `aml.config` reads settings: the leaves of a YAML file and words of the command line, by their declared types.

Sections are dataclasses by name. The metadata of a field holds its limits: low, high, above, below.
"""

from __future__ import annotations

import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field, fields
from typing import Any, Literal


class Reading:
    """What was read: `values`, by section and name, and `problems`, a line for each mistake."""

    def __init__(self, sections: Mapping[str, Any]):
        self.sections = sections
        self.values: dict[str, dict[str, Any]] = {name: {} for name in sections}
        self.problems: list[str] = []

    def add_yaml(self, text: str, source: str) -> None:
        """source: the name of the file, for messages."""
        import yaml

        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            self.problems.append(f"{source}{line}: not YAML: {getattr(error, 'problem', None) or error}")
            return
        if root is None:  # an empty file asks for the defaults
            return
        for section, node, where in self._pairs(root, source, "the file"):
            if section not in self.sections:
                self.problems.append(f"{where}: unknown section {section!r}{self._hint(section)}")
                continue
            for name, leaf, place in self._pairs(node, source, f"section {section}"):
                if isinstance(leaf, yaml.ScalarNode):
                    self._assign(place, f"{section}.{name}", leaf.value, leaf.tag == "tag:yaml.org,2002:null")
                else:
                    self.problems.append(f"{place}: {section}.{name} must be a single value, not a list or a mapping")

    def add_words(self, words: Sequence[str]) -> None:
        """words: section.name=value; a later one counts, and any of them more than a file that was read before."""
        for word in words:
            key, equals, text = word.partition("=")
            if equals:
                self._assign("command line", key, text, text == "null")
            else:
                self.problems.append(f"command line: {word!r} is not a setting: write section.name=value")

    def _pairs(self, node: Any, source: str, what: str) -> Iterator[tuple[str, Any, str]]:
        """(key, node, place) of a YAML mapping; refuses other kinds of node and a key that is given twice."""
        import yaml

        if not isinstance(node, yaml.MappingNode):
            given = "a list" if isinstance(node, yaml.SequenceNode) else node.value
            got = repr(given) if given else "nothing"
            self.problems.append(
                f"{source}:{node.start_mark.line + 1}: {what} must be a mapping of names to values, "
                f"got {got}; leave it out to keep the defaults"
            )
            return
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            if name in first:
                self.problems.append(f"{source}:{line}: {what} gives {name!r} twice, first in line {first[name]}")
            else:
                first[name] = line
                yield name, value, f"{source}:{line}"

    def _assign(self, where: str, key: str, text: str, null: bool) -> None:
        section, _, name = key.partition(".")
        declared = {f.name: f for f in fields(self.sections[section])} if section in self.sections else {}
        if name not in declared:
            self.problems.append(f"{where}: unknown setting {key!r}{self._hint(key)}")
            return
        kind = kind_of(self.sections[section], name)
        try:
            value = _value(kind, text, null)
        except ValueError:
            self.problems.append(f"{where}: {key} takes {kind_name(kind)}, got {text!r}")
            return
        problem = value_problem(declared[name], kind, value)
        if problem:
            self.problems.append(f"{where}: {key} {problem}")
        else:
            self.values[section][name] = value

    def _hint(self, key: str) -> str:
        """What an unknown name may have meant: the same name elsewhere, a near spelling, or what there is."""
        names = [f"{section}.{f.name}" for section, kind in self.sections.items() for f in fields(kind)]
        section, _, leaf = key.rpartition(".")
        near = [name for name in names if name.partition(".")[2] == leaf]
        spelled = names if section else [*self.sections, *names]
        near = near or difflib.get_close_matches(key, spelled, n=2, cutoff=0.7)
        if not near and section not in self.sections:
            leaves = difflib.get_close_matches(leaf, [name.partition(".")[2] for name in names], n=1, cutoff=0.7)
            near = [name for name in names if name.partition(".")[2] in leaves]
        if near:
            return "; did you mean " + " or ".join(near) + "?"
        if section in self.sections:
            return f"; {section} has " + ", ".join(f.name for f in fields(self.sections[section]))
        return "; sections are " + ", ".join(self.sections)


def _value(kind: Any, text: str, null: bool) -> Any:
    """The value that `text` stands for, by the declared type; ValueError where it stands for none."""
    inner, optional = _options(kind)
    if null:
        if not optional:
            raise ValueError("null")
        return None
    if inner is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return inner(text) if inner in (int, float) else text


def value_problem(f: Field[Any], kind: Any, value: Any) -> str | None:
    """What is wrong with a value of field `f`, or None."""
    inner, optional = _options(kind)
    if value is None and optional:
        return None
    if typing.get_origin(inner) is Literal:
        right = value in typing.get_args(inner)
    elif inner is float:
        right = type(value) in (int, float) and math.isfinite(value)
    else:
        right = type(value) is inner
    if not right:
        return f"takes {kind_name(kind)}, got {value!r}"
    limits = f.metadata
    if "low" in limits and value < limits["low"]:
        return f"must be at least {limits['low']}, got {value!r}"
    if "above" in limits and value <= limits["above"]:
        return f"must be above {limits['above']}, got {value!r}"
    if "high" in limits and value > limits["high"]:
        return f"must be at most {limits['high']}, got {value!r}"
    if "below" in limits and value >= limits["below"]:
        return f"must be below {limits['below']}, got {value!r}"
    return None


def kind_of(section: type, name: str) -> Any:
    """The declared type of a setting."""
    return typing.get_type_hints(section)[name]


def kind_name(kind: Any) -> str:
    """A declared type, in words."""
    inner, optional = _options(kind)
    if typing.get_origin(inner) is Literal:
        name = "one of " + ", ".join(typing.get_args(inner))
    else:
        name = {int: "an integer", float: "a number", bool: "true or false", str: "text"}[inner]
    return name + (" or null" if optional else "")


def _options(kind: Any) -> tuple[Any, bool]:
    """(the kind without None, whether None is allowed)."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        inner = [k for k in typing.get_args(kind) if k is not type(None)]
        return inner[0], True
    return kind, False


def shown(value: Any) -> str:
    """A value as a file or the command line would give it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
