"""The registry finds plugins by their entry points and survives broken ones."""

from __future__ import annotations

import site
import textwrap
from pathlib import Path

import pytest
from helpers import slow

from layerlab import LayerlabError
from layerlab.contract.plugin_probe import Setting, probe
from layerlab.contract.registry import Registry


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install a distribution into a folder of sys.path: name, module source, text of entry_points.txt."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

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


@pytest.mark.parametrize("folder", ["their_plugin.egg-info", "their_plugin-1.2-py3.11.egg-info"])
def test_a_plugin_in_a_checkout_that_is_on_the_path_has_its_version(install, tmp_path, folder):
    install("their-plugin", GOOD.format(name="mine"), "[layerlab.strategies]\nmine = their_plugin:Mine\n")
    (installed,) = tmp_path.glob("*.dist-info")
    (installed / "METADATA").rename(installed / "PKG-INFO")
    installed.rename(tmp_path / folder)
    assert (Registry()["mine"].distribution, Registry()["mine"].version) == ("their-plugin", "1.2")


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


def test_what_an_import_showed_is_remembered_until_a_file_that_it_read_changes(install, tmp_path):
    log = tmp_path / "log"
    source = f"open({str(log)!r}, 'a').write('.')\nfrom their_helper import DEFAULT\n"
    source += textwrap.dedent(GOOD.format(name="mine").replace("0.5", "DEFAULT"))
    (tmp_path / "their_helper.py").write_text("DEFAULT = 0.5")
    install("their-plugin", source, "[layerlab.strategies]\nmine = their_plugin:Mine\n")

    def default() -> str:
        (found,) = probe([Registry()["mine"]])
        return found.settings[0].default

    assert [default(), default()] == ["0.5", "0.5"]
    assert log.read_text() == "."
    (tmp_path / "their_helper.py").write_text("DEFAULT = 0.75")
    assert default() == "0.75"
    with (tmp_path / "their_plugin.py").open("a") as file:
        file.write("\nMine = 3\n")
    assert "not a subclass" in probe([Registry()["mine"]])[0].broken


@slow
def test_what_an_import_showed_is_forgotten_when_something_is_installed(install, tmp_path, monkeypatch):
    base = tmp_path / "user"
    monkeypatch.setenv("PYTHONUSERBASE", str(base))
    packages = Path(site.getusersitepackages().replace(site.getuserbase(), str(base)))
    packages.mkdir(parents=True)
    monkeypatch.setattr("site.USER_SITE", str(packages))
    log = tmp_path / "log"
    install("their-plugin", f"open({str(log)!r}, 'a').write('.')\n" + textwrap.dedent(GOOD.format(name="mine")),
            "[layerlab.strategies]\nmine = their_plugin:Mine\n")
    for expected in (".", "."):
        probe([Registry()["mine"]])
        assert log.read_text() == expected
    (packages / "new-1.0.dist-info").mkdir()
    probe([Registry()["mine"]])
    assert log.read_text() == ".."


@slow
def test_a_plugin_that_was_broken_is_tried_anew_each_time(install, tmp_path):
    install("their-plugin", "import their_helper\n" + textwrap.dedent(GOOD.format(name="mine")),
            "[layerlab.strategies]\nmine = their_plugin:Mine\n")
    assert "their_helper" in probe([Registry()["mine"]])[0].broken
    (tmp_path / "their_helper.py").write_text("")
    (found,) = probe([Registry()["mine"]])
    assert found.broken == ""
    assert found.settings == (Setting("strength", "0.5", ""),)


def test_plugins_that_misbehave_at_their_import_are_told_apart_and_spoil_nothing(install):
    sources = {
        "prints": "print('{}'); import os; os.system('echo {}')" + textwrap.dedent(GOOD.format(name="prints")),
        "dies": "import os; os.write(1, b'[]'); os._exit(3)",
        "patches": "import torch; torch.nn.Module = None" + textwrap.dedent(GOOD.format(name="patches")),
        "fine": GOOD.format(name="fine"),
    }
    for name, source in sources.items():
        install(f"{name}-one", source, f"[layerlab.strategies]\n{name} = {name}_one:Mine\n")
    found = Registry()
    told = dict(zip(sources, probe([found[name] for name in sources]), strict=True))
    assert told["dies"].broken == "its import ended the process with status 3"
    assert [told[name].broken for name in ("prints", "patches", "fine")] == [""] * 3
    assert told["fine"].settings == (Setting("strength", "0.5", ""),)
