"""The papermill engine `layerlab`: cells and epochs as progress, and no cell called completed that was not.

`papermill --engine layerlab in.ipynb out.ipynb` draws the progress itself; under `layerlab batch` it goes to the file
that `$LAYERLAB_PROGRESS` names. Every `import papermill` imports this module with nothing around it to catch an error,
so it imports nothing at its top but what Python has.
"""

from __future__ import annotations

from typing import Any


class LayerlabEngine:
    """What papermill's entry point names; the engine proper is made when papermill asks for one."""

    @staticmethod
    def execute_notebook(nb: Any, kernel_name: str, **options: Any) -> Any:
        """Run the notebook, and raise where papermill would be content: see `_engine`."""
        return _engine().execute_notebook(nb, kernel_name, **options)

    @staticmethod
    def nb_kernel_name(nb: Any, name: str | None = None) -> str:
        """The kernel that the notebook names."""
        return _engine().nb_kernel_name(nb, name)

    @staticmethod
    def nb_language(nb: Any, language: str | None = None) -> str:
        """The language that the notebook names."""
        return _engine().nb_language(nb, language)


def _engine() -> Any:
    from layerlab.runs.papermill_engine import Engine

    return Engine
