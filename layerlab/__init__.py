"""layerlab: a workbook in which anyone can check what papers on layer-wise efficient training claim.

The public names. Each is imported when it is first used, so that `import layerlab` costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# MLflow reports its use to its makers when it is imported, kernels' included, unless this says otherwise before.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# Where each public name stands; a module that is public as a whole names itself.
_PUBLIC = {
    "LayerlabError": "layerlab.base.errors",
    "LayerlabWarning": "layerlab.base.errors",
    "Diverged": "layerlab.base.errors",
    "Refused": "layerlab.base.errors",
    "first_line": "layerlab.base.errors",
    "Estimate": "layerlab.show.interval",
    "LayerMap": "layerlab.show.layer_map",
    "Table": "layerlab.show.table",
    "Batches": "layerlab.contract.run",
    "Preflight": "layerlab.contract.preflight",
    "Replaced": "layerlab.contract.run",
    "Run": "layerlab.contract.run",
    "Wire": "layerlab.contract.wire",
    "Strategy": "layerlab.contract.strategy",
    "load_paper": "layerlab.contract.paper",
    "strategies": "layerlab.contract.registry",
    "Augment": "layerlab.workload.dataset",
    "Dataset": "layerlab.workload.dataset",
    "Split": "layerlab.workload.dataset",
    "noise": "layerlab.workload.dataset",
    "pass_order": "layerlab.workload.dataset",
    "load_dataset": "layerlab.workload.loading",
    "ResidualBlock": "layerlab.workload.blocks",
    "residual_blocks": "layerlab.workload.blocks",
    "OwnData": "layerlab.workload.own",
    "own_data": "layerlab.workload.own",
    "build_model": "layerlab.workload.builders",
    "model_names": "layerlab.workload.builders",
    "NORMALISATION": "layerlab.workload.order",
    "forward_order": "layerlab.workload.order",
    "prefixes": "layerlab.workload.order",
    "Attached": "layerlab.training.attached",
    "Comparison": "layerlab.training.results",
    "Pays": "layerlab.training.pays",
    "FitResult": "layerlab.training.results",
    "Fit": "layerlab.training.loop",
    "Observer": "layerlab.training.loop",
    "attach": "layerlab.training.attached",
    "huggingface_callback": "layerlab.training.callbacks",
    "lightning_callback": "layerlab.training.callbacks",
    "compare": "layerlab.training.fit",
    "evaluate": "layerlab.training.evaluation",
    "fit": "layerlab.training.fit",
    "load_model": "layerlab.training.model_file",
    "save_model": "layerlab.training.model_file",
    "Session": "layerlab.runs.session",
    "Study": "layerlab.runs.session",
    "track": "layerlab.runs.tracking",
    "devices": "layerlab.base.devices",
    "explore": "layerlab.reporting.explore",
    "figures": "layerlab.show.figures",
    "files": "layerlab.base.files",
    "measure": "layerlab.measure",
    "scoreboard": "layerlab.reporting.scoreboard",
}
_MODULES = ("devices", "explore", "figures", "files", "measure", "scoreboard")

if TYPE_CHECKING:
    from layerlab import measure
    from layerlab.base import devices, files
    from layerlab.base.errors import Diverged, LayerlabError, LayerlabWarning, Refused, first_line
    from layerlab.contract.paper import load_paper
    from layerlab.contract.preflight import Preflight
    from layerlab.contract.registry import strategies
    from layerlab.contract.run import Batches, Replaced, Run
    from layerlab.contract.strategy import Strategy
    from layerlab.contract.wire import Wire
    from layerlab.reporting import explore, scoreboard
    from layerlab.runs.session import Session, Study
    from layerlab.runs.tracking import track
    from layerlab.show import figures
    from layerlab.show.interval import Estimate
    from layerlab.show.layer_map import LayerMap
    from layerlab.show.table import Table
    from layerlab.training.attached import Attached, attach
    from layerlab.training.callbacks import huggingface_callback, lightning_callback
    from layerlab.training.evaluation import evaluate
    from layerlab.training.fit import compare, fit
    from layerlab.training.loop import Fit, Observer
    from layerlab.training.model_file import load_model, save_model
    from layerlab.training.pays import Pays
    from layerlab.training.results import Comparison, FitResult
    from layerlab.workload.blocks import ResidualBlock, residual_blocks
    from layerlab.workload.builders import build_model, model_names
    from layerlab.workload.dataset import Augment, Dataset, Split, noise, pass_order
    from layerlab.workload.loading import load_dataset
    from layerlab.workload.order import NORMALISATION, forward_order, prefixes
    from layerlab.workload.own import OwnData, own_data

__all__ = [
    "NORMALISATION",
    "Attached",
    "Augment",
    "Batches",
    "Comparison",
    "Dataset",
    "Diverged",
    "Estimate",
    "Fit",
    "FitResult",
    "LayerMap",
    "LayerlabError",
    "LayerlabWarning",
    "Observer",
    "OwnData",
    "Pays",
    "Preflight",
    "Refused",
    "Replaced",
    "ResidualBlock",
    "Run",
    "Session",
    "Split",
    "Strategy",
    "Study",
    "Table",
    "Wire",
    "attach",
    "build_model",
    "compare",
    "devices",
    "evaluate",
    "explore",
    "figures",
    "files",
    "first_line",
    "fit",
    "forward_order",
    "huggingface_callback",
    "lightning_callback",
    "load_dataset",
    "load_model",
    "load_paper",
    "measure",
    "model_names",
    "noise",
    "own_data",
    "pass_order",
    "prefixes",
    "residual_blocks",
    "save_model",
    "scoreboard",
    "strategies",
    "track",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'layerlab' has no attribute {name!r}")
    # The first name takes torch and much else along; modules ask for these, too, which nobody waits for.
    from layerlab.show import alive

    alive.begin()
    module = importlib.import_module(_PUBLIC[name])
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
