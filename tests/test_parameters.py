"""Parameters as text, on a command line and in plans."""

import shlex
import textwrap
from pathlib import Path

import pytest
from fake_paper import PAPER

from layerlab import LayerlabError, Study, load_paper
from layerlab.base.text import from_yaml, reproduce_command, to_yaml
from layerlab.contract.paper import read_paper
from layerlab.runs.jobs import paper_job


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


def test_a_profile_has_the_values_of_the_one_it_is_like(paper_file):
    paper = read_paper(paper_file("""
        [profiles.quick]
        description = "small"
        memory_gb = 4
        parameters = { epochs = 1, lr = 0.1, data = { digits = 8 } }
        [profiles.cpu]
        description = "larger"
        like = "quick"
        parameters = { epochs = 5, data = { cifar10 = 32 } }
        [profiles.gpu]
        description = "largest"
        like = "cpu"
        parameters = { lr = 0.2 }
        """), "mine")
    assert paper.profile("cpu").parameters == {"epochs": 5, "lr": 0.1, "data": {"cifar10": 32}}
    assert paper.profile("gpu").parameters == {"epochs": 5, "lr": 0.2, "data": {"cifar10": 32}}
    assert paper.profile("gpu").memory_gb == 4
    assert paper.profile("gpu").description == "largest"


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [("cpu", "quick", "in a circle: quick, cpu, quick"), ("quick", "quick", "in a circle"),
     ("fast", "", "is like 'fast'")],
)
def test_a_profile_that_is_like_none_or_itself_is_refused(paper_file, first, second, said):
    file = paper_file(f"""
        [profiles.quick]
        description = "a"
        like = "{first}"
        [profiles.cpu]
        description = "b"
        like = "{second}"
        """)
    with pytest.raises(LayerlabError, match=said):
        read_paper(file, "mine")


@pytest.fixture
def paper_file(tmp_path):
    def write(profiles: str) -> Path:
        file = tmp_path / "paper.toml"
        file.write_text(PAPER.partition("[profiles.quick]")[0] + textwrap.dedent(profiles))
        return file

    return write


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alpha": -1}, "setting 'alpha'"),
        ({"alpha": "much"}, "'alpha' of the lars-skip notebook is a number in the profile, got 'much'"),
        ({"seeds": "all"}, "is a list in the profile"),
        ({"datasets": [1]}, "is a mapping in the profile"),
        ({"compile": 2}, "is true or false in the profile"),
        ({"precision": "float8"}, ""),
        ({"alpah": 1}, "Did you mean 'alpha'"),
    ],
)
def test_a_wrong_value_is_refused_before_a_kernel_starts(given, said):
    if not said:  # a setting of fit, not of the strategy: the notebook says it
        assert paper_job("lars-skip", changed=given).changed == given
        return
    with pytest.raises(LayerlabError, match=said):
        paper_job("lars-skip", changed=given)


def test_parameters_in_force_are_the_profile_s_with_the_changed_ones():
    parameters = load_paper("lars-skip").parameters("quick", {"alpha": 4, "lr": None})
    assert parameters.changed == {"alpha": 4}
    assert parameters.in_force["alpha"] == 4
    assert parameters.in_force["lr"] == load_paper("lars-skip").profile("quick").parameters["lr"]


def test_a_study_takes_its_parameters_from_a_notebook_s_variables(fake, tmp_path):
    fake()
    variables = {"profile": "cpu", "output": tmp_path / "out", "epochs": 2, "pause": None, "unrelated": object()}
    study = Study.of_notebook("fake", variables)
    assert vars(study.parameters) == {"epochs": 2, "pause": 0.0}
    assert study.profile == "cpu"
    with pytest.raises(LayerlabError, match="has no parameter 'pause'"):
        Study.of_notebook("fake", {"epochs": 2})
