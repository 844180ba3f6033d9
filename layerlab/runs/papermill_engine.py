"""Papermill's engine `layerlab`: what `layerlab.runs.engine` loads when papermill asks for it."""

from __future__ import annotations

import os
from typing import Any

from nbclient.exceptions import DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager
from papermill.exceptions import PapermillExecutionError
from papermill.log import logger
from papermill.translators import PythonTranslator, papermill_translators

from layerlab.base.text import as_json
from layerlab.base.usage import USED
from layerlab.show.progress import VARIABLE, drawn, report


class Translator(PythonTranslator):
    """Keys of mappings as they are, where papermill makes texts of numbers and None."""

    @classmethod
    def translate_dict(cls, val: dict[Any, Any]) -> str:
        pairs = [f"{cls.translate(key)}: {cls.translate(value)}" for key, value in val.items()]
        return f"{{{', '.join(pairs)}}}"


def keep_keys() -> None:
    """Let papermill write Python parameters with `Translator` from now on."""
    papermill_translators.register("python", Translator)


class Manager(NotebookExecutionManager):
    """Reports cells as they start, and leaves those that never ran `pending`."""

    def cell_start(self, cell: Any, cell_index: int | None = None, **options: Any) -> None:
        self.current = cell
        report({"cell": cell_index or 0, "cells": len(self.nb.cells), "heading": self._heading(cell_index or 0)})
        super().cell_start(cell, cell_index, **options)

    def _heading(self, number: int) -> str:
        """The heading that a cell stands under, without its marks; empty where there is none."""
        for cell in reversed(self.nb.cells[:number]):
            first = cell.source.lstrip().partition("\n")[0]
            if cell.cell_type == "markdown" and first.startswith("#"):
                return first.lstrip("# ").strip()
        return ""

    def notebook_complete(self, **options: Any) -> None:
        never = [cell for cell in self.nb.cells if cell.metadata.papermill["status"] == self.PENDING]
        super().notebook_complete(**options)
        for cell in never:
            cell.metadata.papermill["status"] = self.PENDING
        self.save()


class Client(PapermillNotebookClient):
    """Runs the cells, and keeps of their outputs what a file can hold.

    Attributes:
        watched: whether a batch wants to know what the cells use.
    """

    watched = False

    def start_new_kernel_client(self, **options: Any) -> Any:
        """As nbclient's, and a kernel that dies before its first word has died as one that does so later."""
        try:
            return super().start_new_kernel_client(**options)
        except RuntimeError as error:
            raise DeadKernelError(str(error)) from None

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        """As nbclient's, with a mark in the place of what is no character, which UTF-8 cannot write."""
        return super().process_message({**msg, "content": _writable(msg["content"])}, cell, cell_index)

    def papermill_execute_cells(self) -> None:
        """As papermill's, and a cell in which the kernel dies or its time runs out is a failed one.

        What they use is written down where that is wanted.
        """
        watched = self.watched and self.nb.metadata.get("kernelspec", {}).get("language", "python") == "python"
        try:
            if watched:
                self._hidden("start_for_process")
            super().papermill_execute_cells()
            if watched:
                self._hidden("save")
        except BaseException as error:
            self.nb_man.cell_exception(self.nb_man.current, exception=error)
            raise


    def _hidden(self, function: str) -> None:
        """Call a function of `layerlab.base.usage` in the kernel, beside the cells; one without layerlab says no."""
        assert self.kc is not None
        code = f"__import__('layerlab.base.usage', fromlist=['usage']).{function}()"
        self.wait_for_reply(self.kc.execute(code, silent=True, store_history=False))


def _writable(value: Any) -> Any:
    """A message's content whose texts can be written as UTF-8: half a surrogate pair becomes `\\udcc3`."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {_writable(key): _writable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_writable(each) for each in value]
    return value


class Engine(NBClientEngine):
    """Runs a notebook with progress, and raises where papermill would be content."""

    @classmethod
    def execute_notebook(
        cls, nb: Any, kernel_name: str, output_path: Any = None, progress_bar: Any = True,
        log_output: bool = False, autosave_cell_every: int = 30, **options: Any,
    ) -> Any:
        """Run the notebook.

        Args:
            environment: variables for the kernel, besides this process's own.

        Raises:
            PapermillExecutionError: `sys.exit()` in a cell, which papermill calls a success.
        """
        # Papermill notes them there, and a notebook's file sorts keys, which have to be texts for that.
        noted = nb.metadata.get("papermill", {})
        noted["parameters"] = as_json(noted.get("parameters", {}))
        manager = Manager(nb, output_path, log_output, False, autosave_cell_every)
        name = os.path.basename(str(output_path or options.get("input_path") or "notebook"))
        if source := nb.metadata.pop("layerlab", {}).get("source"):
            nb.metadata.papermill["input_path"] = source
        manager.notebook_start()
        try:
            with drawn(name, bool(progress_bar) and VARIABLE not in os.environ):
                cls.execute_managed_notebook(manager, kernel_name, log_output=log_output, **options)
        finally:
            manager.notebook_complete()
        for index, cell in enumerate(manager.nb.cells):
            if "raises-exception" in cell.metadata.get("tags", []):
                continue
            for output in cell.get("outputs", []):
                if output.output_type == "error" and output.ename == "SystemExit":
                    raise PapermillExecutionError(
                        index, cell.execution_count, cell.source, output.ename, output.evalue, output.traceback
                    )
        return manager.nb

    @classmethod
    def execute_managed_notebook(
        cls, nb_man: Any, kernel_name: str, log_output: bool = False, stdout_file: Any = None,
        stderr_file: Any = None, start_timeout: int = 60, execution_timeout: int | None = None,
        environment: dict[str, str] | None = None, input_path: Any = None, **options: Any,
    ) -> Any:
        client = Client(
            nb_man, timeout=execution_timeout, startup_timeout=start_timeout, kernel_name=kernel_name, log=logger,
            log_output=log_output, stdout_file=stdout_file, stderr_file=stderr_file, **options,
        )
        client.watched = USED in (environment or {})
        return client.execute(env={**os.environ, **(environment or {})})
