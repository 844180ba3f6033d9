"""Parameters as text: the YAML of plans and of the command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

# PyYAML's own are of YAML 1.1, where an exponent needs a point and a sign.
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2."""


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would take for a number."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def from_yaml(text: str) -> Any:
    """The value that a YAML text stands for; numbers as in YAML 1.2, so that `1e-3` is one.

    Raises:
        yaml.YAMLError: it is none.
    """
    return yaml.load(text, _Loader)


def to_yaml(value: Any) -> str:
    """The same the other way, in one line."""
    return yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()


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
