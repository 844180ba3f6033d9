"""An installed strategy in a line: who installs it, and its paper."""

from __future__ import annotations

from layerlab.base.errors import LayerlabError
from layerlab.contract.paper import load_paper
from layerlab.contract.registry import Plugin

# The text in place of a plugin's paper begins so.
BROKEN, NO_PAPER = "broken: ", "no paper: "


def plugin_row(plugin: Plugin, broken: str) -> tuple[str, str, str]:
    """An installed strategy: its name, who installs it, and its paper, or why there is none.

    Args:
        plugin: of the registry.
        broken: why it cannot be used; empty where it can. Only an import of the plugin tells, so the caller passes it.
    """
    if broken:
        text = f"{BROKEN}{broken}"
    else:
        try:
            text = load_paper(plugin).citation
        except LayerlabError as error:
            text = f"{NO_PAPER}{error}"
    return plugin.name, f"{plugin.distribution} {plugin.version}", text
