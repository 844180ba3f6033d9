"""The examples in the docstrings of public names, run as they stand."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Iterator
from typing import Any

import pytest

import layerlab
from layerlab import Comparison, build_model, compare, load_dataset


def documented() -> Iterator[tuple[str, Any]]:
    """(name, object) of every public name whose docstring, or whose members' docstrings, hold examples."""
    for name in layerlab.__all__:
        yield name, getattr(layerlab, name)


@pytest.fixture(scope="module")
def both() -> Comparison:
    data = load_dataset("digits", limit=256, test_limit=64, device="cpu")

    def network() -> Any:
        return build_model("mlp", num_classes=10, image_size=8, width=16)

    return compare(network, data, {"plain": (), "same": ()}, seeds=[0, 1, 2], epochs=1, progress=False)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "value"), documented())
def test_the_examples_run(name, value, both):
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        pytest.skip("has no docstring of its own")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    runner = doctest.DocTestRunner(optionflags=flags)
    for example in doctest.DocTestFinder(recurse=True).find(value, name, globs={"both": both}):
        if example.examples:
            result = runner.run(example)
            assert result.failed == 0, f"an example of {example.name} does not run"


@pytest.mark.parametrize(("name", "value"), documented())
def test_each_public_class_and_function_has_an_example(name, value):
    if inspect.isclass(value) or inspect.isfunction(value):
        found = doctest.DocTestFinder(recurse=True).find(value, name)
        assert any(each.examples for each in found), f"{name} has no example in its docstring"
