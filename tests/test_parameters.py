"""Parameters as text, on a command line and in plans."""

import shlex

import pytest

from layerlab.base.text import from_yaml, reproduce_command, to_yaml


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 0.001), ("-2E+4", -20000.0), (".5e1", 5.0), ("1.e2", 100.0), ("[1e-4, 3e-4]", [1e-4, 3e-4]),
    ("{lr: 1e-3, epochs: 3}", {"lr": 0.001, "epochs": 3}), ("0.1", 0.1), ("3", 3),
    # What only looks like a number stays what it is.
    ("1e", "1e"), ("e3", "e3"), ("1.2.3e4", "1.2.3e4"), ("'1e-3'", "1e-3"), ("resnet-20", "resnet-20"), ("true", True),
])
def test_numbers_may_have_a_bare_exponent(text, value):
    assert from_yaml(text) == value


@pytest.mark.parametrize("value", [1e-5, "1e-5", [0.1, None, "it's"], {"cifar10": {"limit": 400}}, "", True])
def test_a_command_gives_every_parameter_back(value):
    words = shlex.split(reproduce_command("mine", "cpu", {"it": value}, "--output", "a folder"))
    assert words[:5] == ["layerlab", "reproduce", "mine", "--profile", "cpu"]
    assert words[5] == "-p"
    assert from_yaml(words[6].removeprefix("it=")) == value
    assert words[7:] == ["--output", "a folder"]
    assert from_yaml(to_yaml(value)) == value
