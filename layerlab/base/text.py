"""Parameters as text: YAML 1.2 in plans and on the command line, JSON in records."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from io import StringIO
from typing import Any, ClassVar, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.composer import Composer, MaxDepthExceededError
from ruamel.yaml.constructor import DuplicateKeyError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter
from ruamel.yaml.resolver import VersionedResolver

from layerlab.base.errors import LayerlabError

# What a text may hold; an alias counts as often as what it stands for.
LONGEST = 4_000_000  # characters
DEEPEST = 50  # lists and mappings in each other
MOST = 100_000  # values
_TAG = "tag:yaml.org,2002:"
# The core schema, https://yaml.org/spec/1.2.2/#103-core-schema, with the first characters of each; every other plain
# scalar is a text, also `12:30`, `1_000` and `2024-01-01`. ruamel's own rules take more for numbers, and dates.
_CORE = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+.0123456789"),
    # Not of the schema; plans say with it what several jobs have in common.
    ("merge", r"<<", "<"),
)


class NoYaml(LayerlabError):
    """A text that is no YAML at all."""


def _rules() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """First character → (tag, form) of the plain scalars that are no texts, as ruamel wants them."""
    rules = {"": [(f"{_TAG}null", re.compile(""))]}
    for kind, form, first in _CORE:
        for character in first:
            rules.setdefault(character, []).append((_TAG + kind, re.compile(rf"(?:{form})\Z")))
    return rules


class _Resolver(VersionedResolver):
    """The core schema, whatever version a text says that it is."""

    rules: ClassVar = _rules()

    @property
    def versioned_resolver(self) -> Any:
        return self.rules

    @property
    def processing_version(self) -> Any:
        return (1, 2)


class _Composer(Composer):
    """Stops at what is too large, at circles and at keys that come twice."""

    def __init__(self, loader: Any = None) -> None:
        super().__init__(loader)
        self.warn_double_anchors = False
        self._values = 0
        # Of what an anchor names, once it is complete.
        self._sizes: dict[str, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.parser.peek_event()
        alias = isinstance(event, AliasEvent)
        before = self._values
        if alias and event.anchor in self.anchors:
            if event.anchor not in self._sizes:
                _refuse(f"contains itself: *{event.anchor}", event, "write out what you mean")
            self._values += self._sizes[event.anchor]
        else:
            self._values += 1
        if self._values > MOST:
            _refuse(f"stands for more than {MOST:,} values", event, "split it, or use fewer aliases")
        if not alias:
            self._sizes.pop(event.anchor, None)
        node = super().compose_node(parent, index)
        if not alias and event.anchor is not None:
            self._sizes[event.anchor] = self._values - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: MappingNode = super().compose_mapping_node(anchor)
        known = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                _refuse("has a list or a mapping as a key", key, "take texts, numbers, true, false and null")
            if (key.tag, key.value) in known:
                _refuse(f"gives {key.value!r} twice", key, "keep one of them")
            known.add((key.tag, key.value))
        return node


class _Constructor(SafeConstructor):
    """Values of the core schema and no others: no dates, sets, bytes or Python objects."""

    def construct_undefined(self, node: Any) -> None:
        tag = str(node.tag).replace(_TAG, "!!")
        _refuse(f"has the tag {tag}", node, "take null, true, false, numbers, texts, lists and mappings alone, and "
                "quote a text that begins with an exclamation mark")


_Constructor.yaml_constructors = {
    **{_TAG + kind: SafeConstructor.yaml_constructors[_TAG + kind]
       for kind in ("null", "bool", "int", "float", "str", "seq", "map")},
    None: _Constructor.construct_undefined,
}


class _Representer(SafeRepresenter):
    """Writes what comes several times several times, without names for it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        # ruamel writes this character, a line's end in YAML 1.1, as it is, and reads a space.
        return self.represent_scalar(f"{_TAG}str", data, style='"' if "\x85" in data else None)


_Representer.add_representer(str, _Representer.represent_str)


class _Refused(Exception):
    """What a text has and may not have, where, and the remedy."""


def _refuse(what: str, at: Node | Any, remedy: str) -> NoReturn:
    raise _Refused(f"{what} (line {at.start_mark.line + 1}); {remedy}")


def _yaml() -> YAML:
    """A reader and writer; each serves once."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Composer, yaml.Constructor, yaml.Representer = _Resolver, _Composer, _Constructor, _Representer
    yaml.max_depth = DEEPEST
    yaml.default_flow_style = True
    yaml.width = 10**6
    return yaml


def from_yaml(text: str, owner: str = "The text") -> Any:
    """The value that a YAML text stands for, by YAML 1.2's core schema.

    Args:
        text: a single document.
        owner: what the text is of, for the error: `The plan p.yaml`.

    Raises:
        NoYaml: it is no YAML.
        LayerlabError: it is too long, nests too deeply, stands for too many values or for itself, gives a key twice, or
            has a tag that is none of the core schema's.

    Example:
        >>> from_yaml("{lr: 1e-3, at: 12:30, 1: 010}")
        {'lr': 0.001, 'at': '12:30', 1: 10}
    """
    if len(text) > LONGEST:
        raise LayerlabError(f"{owner} is longer than {LONGEST:,} characters; split it.")
    try:
        return _yaml().load(text)
    except _Refused as refused:
        raise LayerlabError(f"{owner} {refused}.") from None
    except DuplicateKeyError as error:
        raise LayerlabError(f"{owner} gives a key twice (line {_line(error)}); keep one of them.") from None
    except MaxDepthExceededError as error:
        raise LayerlabError(f"{owner} nests more than {DEEPEST} lists and mappings in each other (line "
                            f"{_line(error)}); write it flatter.") from None
    except MarkedYAMLError as error:
        said = " ".join(part for part in (error.context, error.problem) if part)
        raise NoYaml(f"{owner} is no YAML: {said} (line {_line(error)}).") from None
    except (YAMLError, ValueError, KeyError, IndexError) as error:
        # What no text may contain, and scalars that are not what their tag says: `!!int x`, or ten thousand digits.
        raise NoYaml(f"{owner} is no YAML: {' '.join(str(error).split())}.") from None


def _line(error: MarkedYAMLError) -> int:
    mark = error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


def assigned(values: Mapping[str, Any]) -> str:
    """Values with their names, in a line.

    Example:
        >>> assigned({"alpha": 8, "seeds": [0, 1]})
        'alpha=8, seeds=[0, 1]'
    """
    return ", ".join(f"{name}={value}" for name, value in values.items())


def to_yaml(value: Any) -> str:
    """The same the other way, in one line, mappings by their keys where those can be sorted.

    Example:
        >>> to_yaml({"at": "1e-3", "lr": [0.1, None]})
        "{at: '1e-3', lr: [0.1, null]}"
    """
    stream = StringIO()
    _yaml().dump(value, stream)
    return stream.getvalue().removesuffix("...\n").strip()


def as_json(value: Any) -> Any:
    """A value as JSON has it; a key that is no text becomes one that no other key becomes, its YAML: `!!int 1`.

    Mappings, lists and tuples are copied, numbers, texts and None are taken as they are, and of anything else its text.

    Example:
        >>> as_json({"drops": {3: (1, 2)}})
        {'drops': {'!!int 3': [1, 2]}}
    """
    if isinstance(value, Mapping):
        return {_text_key(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    return value if value is None or isinstance(value, str | int | float) else str(value)


def from_json(value: Any) -> Any:
    """The value that `as_json` made JSON of: with its own keys.

    Example:
        >>> from_json({"drops": {"!!int 3": [1, 2]}})
        {'drops': {3: [1, 2]}}
    """
    if isinstance(value, Mapping):
        return {_own_key(key): from_json(each) for key, each in value.items()}
    return [from_json(each) for each in value] if isinstance(value, list) else value


def _text_key(key: Any) -> str:
    if isinstance(key, str):
        return f"!!str {json.dumps(key)}" if key.startswith("!!") else key
    kinds = {bool: "bool", int: "int", float: "float", type(None): "null"}
    kind = kinds.get(type(key))
    return f"!!{kind} {to_yaml(key)}" if kind else str(key)


def _own_key(key: str) -> Any:
    return from_yaml(key) if key.startswith("!!") else key


def reproduce_command(what: str, profile: str = "", parameters: Mapping[str, Any] | None = None, *more: str) -> str:
    """The command that runs a paper's notebook, or one of a user's own, with these parameters.

    Args:
        what: name of a strategy, or the notebook's file.
        profile: of the paper.
        parameters: those that differ from the profile's.
        more: words that follow.
    """
    words = ["layerlab", "reproduce", what, *(["--profile", profile] if profile else [])]
    for name, value in (parameters or {}).items():
        words += ["-p", f"{name}={to_yaml(value)}"]
    return shlex.join([*words, *more])
