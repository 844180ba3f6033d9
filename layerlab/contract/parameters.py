"""The parameters of a paper's notebook: those in force, and which of them differ from the profile's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerlab.base.errors import LayerlabError, brief, unknown
from layerlab.base.text import as_json

if TYPE_CHECKING:
    from layerlab.contract.registry import Plugin

# Kinds of values that may stand for each other.
_NUMBERS = (int, float)


@dataclass(frozen=True)
class Parameters:
    """The parameters of one run of a notebook, merged and checked once.

    Attributes:
        in_force: every parameter with its value, as JSON has it.
        changed: those that differ from the profile's.
    """

    in_force: dict[str, Any]
    changed: dict[str, Any]


def merged_parameters(owner: str, profile: Mapping[str, Any], given: Mapping[str, Any]) -> Parameters:
    """A profile's values with those that were given in their place; None stands for the profile's own.

    Args:
        owner: whose parameters these are, for the error: `the lars-skip notebook`.
        profile: name → value.
        given: name → value.

    Raises:
        LayerlabError: a parameter that the profile does not have, or a value of another kind than the profile's.

    Example:
        >>> merged_parameters("the notebook", {"lr": 0.1, "epochs": 3}, {"epochs": 5, "lr": None})
        Parameters(in_force={'lr': 0.1, 'epochs': 5}, changed={'epochs': 5})
    """
    for name, value in given.items():
        if name not in profile:
            raise unknown(f"parameter of {owner}", name, profile)
        if not _alike(profile[name], value):
            raise LayerlabError(
                f"Parameter {name!r} of {owner} is {_kind(profile[name])} in the profile, got {brief(value)}; give it "
                f"{_kind(profile[name])}."
            )
    chosen = {name: value for name, value in given.items() if value is not None}
    usual, in_force = (as_json(values) for values in (profile, {**profile, **chosen}))
    changed = differing(usual, in_force)
    return Parameters(in_force, {name: value for name, value in chosen.items() if name in changed})


def differing(usual: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """What is not as usual, both as JSON has them; None for what is usual and not there.

    Example:
        >>> differing({"lr": 0.1, "epochs": 3}, {"lr": 0.2, "seeds": [0]})
        {'lr': 0.2, 'epochs': None, 'seeds': [0]}
    """
    missing = object()
    names = dict.fromkeys([*usual, *values])
    return {name: values.get(name) for name in names if values.get(name, missing) != usual.get(name, missing)}


def check_settings(plugin: Plugin, profile: Mapping[str, Any], changed: Mapping[str, Any]) -> None:
    """Hold what was changed against the strategy's settings of the same names.

    This imports the plugin; `layerlab.contract.plugin_probe` does it in a process of its own.

    A parameter whose value in the profile is none that the setting takes (a list to choose from, say) is left to the
    notebook.

    Raises:
        LayerlabError: a value that the setting does not take.
    """
    strategy = plugin.load()
    for name in changed.keys() & strategy.model_fields.keys():
        try:
            strategy(**{name: profile[name]})
        except LayerlabError:
            continue
        strategy(**{name: changed[name]})


def _alike(known: Any, value: Any) -> bool:
    """Whether a value may stand where the profile has `known`."""
    if known is None or value is None or isinstance(known, bool):
        return known is None or value is None or isinstance(value, bool)
    if isinstance(known, _NUMBERS):
        # A list of numbers is tried one after the other where the notebook chooses by itself.
        return isinstance(value, (*_NUMBERS, list)) and not isinstance(value, bool)
    if isinstance(known, list | tuple):
        return isinstance(value, list | tuple | int | float)
    return isinstance(value, type(known))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, _NUMBERS):
        return "a number"
    if isinstance(value, list | tuple):
        return "a list"
    return "a mapping" if isinstance(value, Mapping) else "a text"
