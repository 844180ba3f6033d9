"""The strategy that holds a training step to a number of bytes, for `fit(memory=…)`."""

from __future__ import annotations

from layerlab.base.errors import Refused
from layerlab.contract.strategy import Strategy


def with_memory(strategies: tuple[Strategy, ...], memory: int | str) -> tuple[Strategy, ...]:
    """Strategies of which one holds a training step's memory to a budget.

    Args:
        strategies: given by the user. One of them that has a setting for a budget (`memory_setting`) takes it;
            otherwise the installed strategy that has one is added.
        memory: bytes, or a text such as 2GB.

    Raises:
        Refused: no installed strategy can hold a budget, or several can; the given one has another budget already; the
            strategy does not take this value.
    """
    able = [each for each in strategies if each.memory_setting]
    if not able:
        return (*strategies, _installed(memory))
    chosen = able[0]
    made = type(chosen)(**{**dict(chosen), chosen.memory_setting: memory})
    given = getattr(chosen, chosen.memory_setting)
    if given is not None and given != getattr(made, chosen.memory_setting):
        raise Refused(f"{chosen.name} has {chosen.memory_setting}={given!r} already, and memory={memory!r} is another "
                      "one; leave one of them out.")
    return tuple(made if each is chosen else each for each in strategies)


def _installed(memory: int | str) -> Strategy:
    from layerlab.contract.registry import strategies as installed

    able = {plugin.name: plugin.load() for plugin in installed.every()
            if not plugin.broken and plugin.load().memory_setting}
    if not able:
        raise Refused(f"memory={memory!r} needs a strategy that holds a training step to a budget, and none of those "
                      f"installed ({', '.join(installed) or 'none'}) has a memory_setting; install one, or leave "
                      "memory out.")
    if len(able) > 1:
        raise Refused(f"memory={memory!r} can be held by {' and '.join(map(repr, able))}; give one of them as a "
                      "strategy.")
    kind = next(iter(able.values()))
    return kind(**{kind.memory_setting: memory})
