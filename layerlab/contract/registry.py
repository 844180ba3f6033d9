"""Which strategies are installed: the entry points of group `layerlab.strategies`, in whatever distribution."""

from __future__ import annotations

import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import entrypoints

from layerlab.base.errors import LayerlabError, LayerlabWarning, reason, unknown
from layerlab.base.names import GROUP, NAME
from layerlab.show.table import Table

if TYPE_CHECKING:
    from layerlab.contract.strategy import Strategy


@dataclass
class Plugin:
    """One installed strategy, loaded when first asked for.

    Attributes:
        name: the entry point's name.
        target: what it points to, `module:Class`.
        distribution: the name of the distribution that installs it.
        version: that distribution's version.
    """

    name: str
    target: str
    distribution: str
    version: str

    @cached_property
    def _loaded(self) -> tuple[type[Strategy] | None, str]:
        # torch comes with it, which whoever only starts notebooks does without.
        from layerlab.contract.strategy import Strategy

        if not NAME.fullmatch(self.name):
            return None, f"{self.name!r} is no name for a strategy: it may have small letters, digits and dashes"
        module, _, attribute = self.target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except KeyboardInterrupt:
            raise
        # A plugin may fail in any way at import, also by what is no Exception; it must not take the others along.
        except BaseException as error:
            return None, reason(error)
        if not (isinstance(found, type) and issubclass(found, Strategy)):
            return None, f"{self.target} is not a subclass of layerlab.Strategy"
        if found.name != self.name:
            return None, f"its class is named {found.name!r} but its entry point {self.name!r}; make them the same"
        return found, ""

    @property
    def broken(self) -> str:
        """Why it cannot be used, or an empty string."""
        return self._loaded[1]

    def load(self) -> type[Strategy]:
        """The strategy's class.

        Raises:
            LayerlabError: it does not import, or is no strategy; with the reason.
        """
        strategy, broken = self._loaded
        if strategy is None:
            raise self.refusal(broken)
        return strategy

    def refusal(self, broken: str) -> LayerlabError:
        """The error for a plugin that cannot be used, for the caller to raise.

        Args:
            broken: why.
        """
        return LayerlabError(f"Plugin {self.name!r} of distribution {self.distribution!r} is broken ({broken}); "
                             f"mend or uninstall {self.distribution}.")


class Registry:
    """Strategies by name. Iterates over names; `registry[name]` is a `Plugin`.

    Args:
        plugins: the strategies. Default: those that are installed, looked up when they are first asked for.
    """

    def __init__(self, plugins: Sequence[Plugin] | None = None) -> None:
        self._given = plugins

    @cached_property
    def _plugins(self) -> dict[str, list[Plugin]]:
        by_name: dict[str, list[Plugin]] = {}
        for plugin in installed_plugins() if self._given is None else self._given:
            by_name.setdefault(plugin.name, []).append(plugin)
        return by_name

    def refresh(self) -> None:
        """Look the installed strategies up anew when they are next asked for."""
        vars(self).pop("_plugins", None)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._plugins))

    def __len__(self) -> int:
        return len(self._plugins)

    def __getitem__(self, name: str) -> Plugin:
        """The plugin of that name.

        Raises:
            LayerlabError: unknown (lists what is installed), or claimed by two distributions (names both).
        """
        found = self._plugins.get(name)
        if not found:
            raise unknown("strategy", name, self._plugins, "Install a plugin with pip to add one.")
        if len(found) > 1:
            owners = " and ".join(repr(plugin.distribution) for plugin in found)
            raise LayerlabError(
                f"Two distributions install a strategy named {name!r}: {owners}; uninstall one of them."
            )
        return found[0]

    def __repr__(self) -> str:
        return registry_table(self).text()

    def _repr_html_(self) -> str:
        return registry_table(self)._repr_html_()

    def every(self) -> list[Plugin]:
        """All plugins, those of a doubled name included, by name."""
        return [plugin for name in self for plugin in self._plugins[name]]

    def __call__(self, name: str, **settings: Any) -> Strategy:
        """Make a strategy: `strategies("my-method", share=0.5)`."""
        return self[name].load()(**settings)


def installed_plugins() -> list[Plugin]:
    """The strategies that are installed now.

    The `entrypoints` package gives up on one malformed `entry_points.txt` of any distribution at all; then the
    standard library's reader, which survives it, is used and the offender is named in a warning.
    """
    try:
        points = entrypoints.get_group_all(GROUP)
        plugins = [
            Plugin(
                point.name,
                f"{point.module_name}:{point.object_name or ''}",
                # Taken from the folder's name, where a dash is written as an underscore.
                point.distro.name.replace("_", "-") if point.distro else "?",
                _version(point.distro) if point.distro else "?",
            )
            for point in points
        ]
    except Exception as error:  # configparser's and its own errors, depending on the damage
        offenders = ", ".join(_malformed()) or f"unknown ({error})"
        warnings.warn(
            f"A malformed entry_points.txt is installed, by: {offenders}. Strategies are found all the same; "
            "reinstall that package to be rid of this warning.",
            LayerlabWarning,
            stacklevel=2,
        )
        plugins = [
            Plugin(point.name, point.value, point.dist.name if point.dist else "?",
                   point.dist.version if point.dist else "?")
            for point in importlib.metadata.entry_points(group=GROUP)
        ]
    # An editable install can be seen through two folders of sys.path; the same target of the same owner is one plugin.
    unique = {(plugin.name, plugin.distribution.replace("_", "-").lower(), plugin.target): plugin for plugin in plugins}
    return list(unique.values())


def _version(found: entrypoints.Distribution) -> str:
    """A distribution's version, from its folder's name if it stands there: that of a checkout, `x.egg-info`, has
    none, that of an egg the Python's behind it."""
    if found.version is None:
        try:
            return importlib.metadata.version(found.name)
        except importlib.metadata.PackageNotFoundError:
            return "?"
    return found.version.partition("-py")[0]


def _malformed() -> list[str]:
    """Names of the distributions whose entry_points.txt the `entrypoints` package cannot read."""
    names = []
    for distribution in importlib.metadata.distributions():
        text = distribution.read_text("entry_points.txt")
        if text is None:
            continue
        parser = entrypoints.CaseSensitiveConfigParser(delimiters=("=",))
        try:
            parser.read_string(text)
        except Exception:
            names.append(distribution.name or str(getattr(distribution, "_path", "?")))
    return names


def registry_table(registry: Registry) -> Table:
    """One row an installed strategy: its name, its distribution, and why it cannot be used."""
    rows = [
        (plugin.name, f"{plugin.distribution} {plugin.version}", f"broken: {plugin.broken}" if plugin.broken else "")
        for plugin in registry.every()
    ]
    return Table(("strategy", "installed by", ""), rows, "" if rows else "No strategies are installed.")


# The installed strategies: `strategies["low-bit"]` is a plugin, `strategies("low-bit", bits=8)` makes a strategy.
strategies = Registry()
