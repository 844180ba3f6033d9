"""Notebooks as people have them: each runs, or is refused before anything starts, with the remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from click.testing import CliRunner

from layerlab import LayerlabError
from layerlab.cli.main import main
from layerlab.runs.execution import execute
from layerlab.runs.jobs import Job, notebook_job
from layerlab.runs.notebook_file import kernel_for, parameter_names, read_notebook

PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def code(source: str, *tags: str) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {"tags": list(tags)}, "source": source, "execution_count": None,
            "outputs": []}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a notebook with the given cells; gives its file."""

    def make(*cells: dict[str, Any], name: str = "mine.ipynb", metadata: Any = PYTHON, minor: int = 2) -> Path:
        file = tmp_path / "mine" / name
        file.parent.mkdir(exist_ok=True)
        content = {"cells": list(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": minor}
        file.write_text(json.dumps(content), encoding="utf-8")
        return file

    return make


def printed(job: Job) -> str:
    """What the cells of a job's notebook print."""
    execute(job)
    book = nbformat.read(job.file, 4)
    return "".join(output.text for cell in book.cells for output in cell.get("outputs", ())
                   if output.output_type == "stream")


@pytest.mark.parametrize(("source", "names"), [
    ("epochs: int | None = 3\nday: datetime.date = datetime.date(2020, 1, 1)\nmode: 'Literal[1]' = 1\nbare: int",
     ["epochs", "day", "mode"]),
    ("a, (b, *c) = 1, (2, 3)\nx = y = 5", ["a", "b", "c", "x", "y"]),
    ("conf = {\n  'inner': 1,  # x = 2\n}\ntext = '''\nnot = 9\n'''\nlast = (\n  1\n)", ["conf", "text", "last"]),
    ("if True:\n    inner = 7\nelse:\n    other = 8\ngröße = 4", ["inner", "other", "größe"]),
    ("%matplotlib inline\na = 1\n!true\nb = 2", ["a", "b"]),
    ("%%time\na = 1", ["a"]),
    ("a = 1\r\nb = 2\r\n", ["a", "b"]),
    ("def f():\n    local = 1\na.b = 2\nc == 3", []),
])
def test_a_parameter_is_whatever_the_tagged_cell_assigns(source, names):
    assert parameter_names({"metadata": {}, "cells": [code("other = 1"), code(source, "parameters")]}) == names
    other = {"kernelspec": {"language": "R"}}
    assert parameter_names({"metadata": other, "cells": [code("a <- 1\nb = 'x'", "parameters")]}) == ["a", "b"]


def test_given_values_arrive_whatever_the_annotation_and_the_folder_of_the_notebook_is_on_the_path(write):
    file = write(code("epochs: int | None = 3\nfirst, second = 1, 2", "parameters"),
                 code("import beside_it; print(epochs, first, second, beside_it.value)"), name="a {b} 1% #1'[x].ipynb")
    (file.parent / "beside_it.py").write_text("value = 42")
    assert printed(notebook_job(file, {"epochs": 7, "second": 9})) == "7 1 9 42\n"


def test_a_notebook_runs_where_it_is_asked_to(write, tmp_path):
    file = write(code("import os; print(os.getcwd())"))
    here, there = notebook_job(file), notebook_job(file, cwd=file.parent)
    assert printed(here).strip() == os.getcwd()
    assert here.basis != there.basis
    assert printed(there).strip() == str(file.parent)
    assert f"--cwd {file.parent}" in there.command
    with pytest.raises(LayerlabError, match=r"no folder .*nowhere.*--cwd"):
        notebook_job(file, cwd=tmp_path / "nowhere")


def test_what_is_in_an_old_format_or_begins_with_a_mark_is_read(write):
    old = write()
    old.write_text(json.dumps({"metadata": {"name": "old"}, "nbformat": 3, "nbformat_minor": 0, "worksheets": [
        {"metadata": {}, "cells": [{"cell_type": "code", "collapsed": False, "input": ["print('old')"],
                                    "language": "python", "metadata": {}, "outputs": [], "prompt_number": 1}]}]}))
    assert printed(notebook_job(old)) == "old\n"
    marked = write(code("print('marked')"), metadata={}, minor=0)
    marked.write_bytes(b"\xef\xbb\xbf" + marked.read_bytes().replace(b"\n", b"\r\n"))
    assert printed(notebook_job(marked)) == "marked\n"


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is no notebook that can be read"),
    (b"[1]", "is no notebook that can be read"),
    (b'{"nbformat": 4, "metadata": {}}', "it has no 'cells'"),
    ('{"nbformat": 4, "metadata": {"x": "größe"}, "cells": []}'.encode("latin1"), "save it as UTF-8"),
])
def test_what_is_no_notebook_is_refused(write, content, message):
    file = write()
    file.write_bytes(content)
    with pytest.raises(LayerlabError, match=message):
        notebook_job(file)


def test_parameters_that_would_not_arrive_are_refused(write):
    none = write(code("a = 1"), {"cell_type": "markdown", "metadata": {"tags": ["parameters"]}, "source": "a"})
    with pytest.raises(LayerlabError, match="no code cell tagged `parameters`"):
        notebook_job(none, {"a": 2})
    two = write(code("a = 1", "parameters"), code("b = 2", "parameters"), name="two.ipynb")
    notebook_job(two)
    with pytest.raises(LayerlabError, match="merge them into one"):
        notebook_job(two, {"b": 3})
    with pytest.raises(LayerlabError, match=r"Unknown parameter .*'aa'.*Did you mean 'a'"):
        notebook_job(two, {"aa": 3})


def test_a_foreign_kernel_s_notebook_runs_on_this_python_if_it_is_python_s(write):
    conda = {"kernelspec": {"name": "conda-env-foo-py", "language": "python"}}
    file = write(code("print('ran')"), metadata=conda)
    assert kernel_for(file, read_notebook(file)).name == "python3"
    with pytest.warns(UserWarning, match="'conda-env-foo-py' of mine.ipynb is not installed here; this Python runs it"):
        assert printed(notebook_job(file)) == "ran\n"
    for metadata in ({"kernelspec": {"name": "ir", "language": "R"}}, {"language_info": {"name": "julia"}}):
        file = write(code("1"), metadata=metadata)
        with pytest.raises(LayerlabError, match=r"is written in (R|julia).*--kernel"):
            notebook_job(file)
        assert notebook_job(file, kernel="python3").kernel == "python3"
    ended = CliRunner().invoke(main, ["reproduce", str(file), "--kernel", "ptyhon3"])
    assert ended.exit_code == 2
    assert "Did you mean 'python3'" in ended.output
    ended = CliRunner().invoke(main, ["reproduce", "lars-skip", "--kernel", "python3"])
    assert ended.exit_code == 2
    assert "notebooks of your own" in ended.output


def test_an_error_that_its_cell_announces_is_none_and_another_one_is_named(write):
    expected = code("1 / 0", "raises-exception")
    file = write(expected, code("import sys; sys.exit(3)", "raises-exception"), code("print('after')"))
    assert printed(notebook_job(file)).endswith("after\n")
    file = write(expected, code("raise KeyError('the real one')"))
    with pytest.raises(LayerlabError, match=r"failed in cell 2 .*the real one"):
        execute(notebook_job(file))


def test_outputs_that_are_no_text_are_kept_as_far_as_they_can_be(write):
    file = write(code("print('x\\udcc3y')"), code("'p\\ud800q'"))
    assert "x" in printed(notebook_job(file))
    file = write(code("raise ValueError('bad file \\udce9.txt')"))
    with pytest.raises(LayerlabError, match="bad file"):
        execute(notebook_job(file))
