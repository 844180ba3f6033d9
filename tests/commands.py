"""Commands on pages, held against the parsers, targets, extras and files that there are."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator

import click
from pages import ROOT

from layerlab.cli.main import main

# What a command may stand behind: settings of the environment, programs that run others.
BEFORE = re.compile(r"^(?:[A-Z_]+=\S*|nohup|podman|docker)$")
ENDS = frozenset({"&&", "||", "|", ";", "&"})
TARGETS = frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command in a text of a shell, comments and settings of variables left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = next((place for place, word in enumerate(words) if word in ENDS), len(words))
            command, words = words[:end], words[end + 1:]
            while command and BEFORE.match(command[0]):
                command = command[1:]
            if command:
                yield [command[0].removeprefix(".venv/bin/"), *command[1:]]


def wrong(command: list[str]) -> str:
    """What is wrong with a command, in a sentence; empty if nothing is, or if the command is none of ours."""
    name, *rest = command[0].removeprefix("%"), *command[1:]
    match name:
        case "layerlab":
            return wrong_layerlab(rest)
        case "make":
            missing = [target for target in rest if "=" not in target and target not in TARGETS]
            return f"Makefile has no target {missing}" if missing else ""
        case "pip":
            wanted = set(re.findall(r"layerlab\[(\w+)\]", " ".join(rest)))
            missing = sorted(wanted - set(PROJECT["optional-dependencies"]))
            return f"pyproject.toml has no extra {missing}" if missing else ""
        case "python" | "papermill":
            files = [word.partition("::")[0] for word in rest if re.match(r"(tests|benchmarks|notebooks)/", word)]
            missing = [file for file in files if not (ROOT / file).exists()]
            return f"there is no {missing}" if missing else ""
    return ""


def wrong_layerlab(words: list[str]) -> str:
    """What the parser of `layerlab` says against words behind it, options' values included."""
    command: click.Command = main
    context = click.Context(main, info_name="layerlab")
    while isinstance(command, click.Group):
        options = [word for word in words[:1] if word.startswith("-")]
        if options:
            break
        if not words:
            return ""
        inner = command.get_command(context, words[0])
        if inner is None:
            if not command.invoke_without_command or command is main:
                return f"layerlab has no command {words[0]!r}"
            break
        command, words = inner, words[1:]
        context = click.Context(command, parent=context, info_name=command.name)
    try:
        values, left, order = command.make_parser(context).parse_args(list(words))
        if left:
            return f"layerlab {command.name} takes no {left}"
        for parameter in order:
            # Paths on pages are examples; names of formats and kinds are not.
            if isinstance(parameter.type, click.Choice):
                parameter.type_cast_value(context, values[str(parameter.name)])
    except click.UsageError as error:
        return f"layerlab {command.name}: {error.format_message()}"
    return ""
