"""The registry finds plugins by their entry points and survives broken ones."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from layerlab import LayerlabError
from layerlab.contract.registry import Registry


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a distribution into a folder of sys.path: name, module source, text of entry_points.txt."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, source: str, points: str) -> None:
        (tmp_path / f"{name.replace('-', '_')}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{name.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(textwrap.dedent(points))

    return add


GOOD = """
    from layerlab import Strategy
    class Mine(Strategy):
        name = "{name}"
        strength: float = 0.5
"""


def test_a_plugin_of_another_distribution_is_found(install):
    install("their-plugin", GOOD.format(name="mine"), "[layerlab.strategies]\nmine = their_plugin:Mine\n")
    found = Registry()
    assert found["mine"].distribution == "their-plugin"
    assert found["mine"].version == "1.2"
    assert found("mine", strength=0.25).strength == 0.25


def test_an_unknown_name_lists_what_is_installed_and_the_nearest_spelling(install):
    install("their-plugin", GOOD.format(name="mine"), "[layerlab.strategies]\nmine = their_plugin:Mine\n")
    with pytest.raises(LayerlabError, match=r"Unknown strategy 'lars-skp'. Did you mean 'lars-skip'\?.*mine"):
        Registry()["lars-skp"]


def test_two_distributions_with_one_name_are_both_named(install):
    install("first-one", GOOD.format(name="twin"), "[layerlab.strategies]\ntwin = first_one:Mine\n")
    install("second-one", GOOD.format(name="twin"), "[layerlab.strategies]\ntwin = second_one:Mine\n")
    with pytest.raises(LayerlabError, match=r"'twin': '(first|second)-one' and '(first|second)-one'"):
        Registry()["twin"]
    assert "lars-skip" in Registry()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "no_such_module"),
        ("raise SystemExit(0)", "SystemExit"),
        ("Mine = 3", "not a subclass of layerlab.Strategy"),
        (GOOD.format(name="other"), "make them the same"),
    ],
)
def test_a_broken_plugin_is_reported_with_its_reason_and_the_rest_works(install, source, reason, monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "broken_one", raising=False)
    install("broken-one", source, "[layerlab.strategies]\nbroken = broken_one:Mine\n")
    found = Registry()
    assert reason in found["broken"].broken
    with pytest.raises(LayerlabError, match="broken-one"):
        found("broken")
    assert found["lars-skip"].broken == ""
    sys.modules.pop("broken_one", None)


@pytest.mark.parametrize("text", ["this is no ini file\n", "[a]\nx = m:f\nx = m:g\n"])
def test_a_malformed_file_of_an_unrelated_package_is_named_and_survived(install, text):
    install("unrelated-package", "", text)
    with pytest.warns(UserWarning, match="unrelated-package"):
        found = Registry()["lars-skip"]
    assert found.load().name == "lars-skip"
