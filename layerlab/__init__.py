"""layerlab: a workbook in which anyone can check what papers on layer-wise efficient training claim.

The public names. They are imported when first used, so that `import layerlab` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "LayerlabError": "layerlab.errors",
    "LayerMap": "layerlab.strategy",
    "Replaced": "layerlab.strategy",
    "Run": "layerlab.strategy",
    "Strategy": "layerlab.strategy",
    "Dataset": "layerlab.data",
    "load_dataset": "layerlab.data",
    "build_model": "layerlab.models",
    "forward_order": "layerlab.models",
    "prefixes": "layerlab.models",
    "compare": "layerlab.training",
    "evaluate": "layerlab.training",
    "fit": "layerlab.training",
    "load_paper": "layerlab.papers",
    "Study": "layerlab.study",
    "load_model": "layerlab.saving",
    "save_model": "layerlab.saving",
    "track": "layerlab.tracking",
    "measure": "",
    "figures": "",
    "explore": "",
}

if TYPE_CHECKING:
    from layerlab import explore, figures, measure
    from layerlab.data import Dataset, load_dataset
    from layerlab.errors import LayerlabError
    from layerlab.models import build_model, forward_order, prefixes
    from layerlab.papers import load_paper
    from layerlab.registry import Registry
    from layerlab.saving import load_model, save_model
    from layerlab.strategy import LayerMap, Replaced, Run, Strategy
    from layerlab.study import Study
    from layerlab.tracking import track
    from layerlab.training import compare, evaluate, fit

    strategies: Registry

__all__ = [
    "Dataset", "LayerMap", "LayerlabError", "Replaced", "Run", "Strategy", "Study", "build_model", "compare",
    "evaluate", "explore", "figures", "fit", "forward_order", "load_dataset", "load_model", "load_paper", "measure",
    "prefixes", "save_model", "strategies", "track",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "strategies":
        from layerlab.registry import installed

        value: Any = installed()
    elif name in _PUBLIC:
        module = _PUBLIC[name]
        loaded = importlib.import_module(module or f"layerlab.{name}")
        value = getattr(loaded, name) if module else loaded
    else:
        raise AttributeError(f"module 'layerlab' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
