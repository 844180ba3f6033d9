"""A number for each layer in each epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd


class LayerMap(NamedTuple):
    """What a strategy did to each layer, or found out about it, in each epoch.

    Attributes:
        table: layers as index, in forward order (input first), epochs as columns; NaN where there is nothing to say.
        label: what the numbers are, with their unit.
        states: where the numbers are 0, 1, … as names of something: those names.

    Example:
        >>> import pandas as pd
        >>> from layerlab import LayerMap
        >>> table = pd.DataFrame({1: [0, 0], 2: [1, 0]}, index=["conv1", "conv2"])
        >>> LayerMap(table, "skipped", ("learns", "skipped")).states
        ('learns', 'skipped')
    """

    table: pd.DataFrame
    label: str
    states: tuple[str, ...] = ()
