"""Parameters as text, on a command line and in plans."""

import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from fake_paper import PAPER
from helpers import slow

from layerlab import LayerlabError, Study, load_paper
from layerlab.base.text import NoYaml, as_json, from_json, from_yaml, reproduce_command, to_yaml
from layerlab.contract.paper import read_paper
from layerlab.runs.batch.plans import Plan, jobs_of
from layerlab.runs.jobs import paper_job


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 0.001), ("-2E+4", -20000.0), (".5e1", 5.0), ("1.e2", 100.0), ("[1e-4, 3e-4]", [1e-4, 3e-4]),
    ("{lr: 1e-3, epochs: 3}", {"lr": 0.001, "epochs": 3}), ("0.1", 0.1), ("3", 3),
    # What only looks like a number stays what it is.
    ("12:30", "12:30"), ("2024-13-45", "2024-13-45"), ("{2024-01-01: 3}", {"2024-01-01": 3}), ("1_000", "1_000"),
    ("yes", "yes"), ("0b1", "0b1"), ("010", 10), ("0o17", 15), ("0x1F", 31), ("~", None), ("-.INF", -float("inf")),
    ("{7: a, null: b}", {7: "a", None: "b"}), ("%YAML 1.1\n---\n[010, on]", [10, "on"]),
    ("{<<: {a: 1, b: 2}, a: 3}", {"a": 3, "b": 2}),
    ("1e", "1e"), ("e3", "e3"), ("1.2.3e4", "1.2.3e4"), ("'1e-3'", "1e-3"), ("resnet-20", "resnet-20"), ("true", True),
])
def test_values_are_those_of_yaml_1_2(text, value):
    assert from_yaml(text) == value


@pytest.mark.parametrize("value", [1e-5, "1e-5", [0.1, None, "it's"], {"cifar10": {"limit": 400}}, "", True,
                                   {1: "a", None: "010", "1": "0x1"}, ["12:30", "~", "<<", "\x85", "a\nb", "- a"]])
def test_a_command_gives_every_parameter_back(value):
    words = shlex.split(reproduce_command("mine", "cpu", {"it": value}, "--output", "a folder"))
    assert words[:5] == ["layerlab", "reproduce", "mine", "--profile", "cpu"]
    assert words[5] == "-p"
    assert from_yaml(words[6].removeprefix("it=")) == value
    assert words[7:] == ["--output", "a folder"]
    assert from_yaml(to_yaml(value)) == value


@pytest.mark.parametrize("value", [{"drops": {3: [1], None: 2.5}, True: "x"}, {"!!int 1": {1: 0}}, {"!!": 1}])
def test_json_keeps_the_kinds_of_keys(value):
    text = json.dumps(as_json(value), sort_keys=True)
    assert from_json(json.loads(text)) == value


def test_what_is_too_much_or_no_value_gets_a_sentence_and_no_text_stands_for_it():
    for text in ("{a: 1, a: 2}", "&a [*a]", "[" * 99, "!!binary aGVs", "<<"):
        with pytest.raises(LayerlabError) as caught:
            from_yaml(text)
        assert not isinstance(caught.value, NoYaml), text
    for text in ("[", "*.png", "@home", "a: b: c", "!!int x", "9" * 5000):
        with pytest.raises(NoYaml):
            from_yaml(text)


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


def _plan(given: dict) -> Plan:
    return Plan(jobs=[{"paper": ["lars-skip"], "parameters": given}])


def test_a_value_that_the_strategy_s_setting_does_not_take_is_refused_before_a_kernel_starts(tmp_path):
    with pytest.raises(LayerlabError, match=r"job 1: lars-skip: setting 'alpha' should be greater than.*got -1"):
        jobs_of(_plan({"alpha": -1}), tmp_path)
    assert [job.problem for job in jobs_of(_plan({"alpha": 3, "precision": "float8"}), tmp_path)] == [""]


MISBEHAVING = {
    "import os; os._exit(3)": "its import ended the process with status 3",
    "import os; os.abort()": "its import ended the process with signal 6",
    "raise ValueError('half installed')": "ValueError: half installed",
    # What it starts holds the pipe of the answer open.
    "import subprocess; subprocess.Popen(['sleep', '600'], close_fds=False)": "",
}


@pytest.mark.parametrize(("source", "said"), [
    pytest.param(source, said, marks=() if "exit" in source else slow) for source, said in MISBEHAVING.items()])
def test_a_plugin_that_misbehaves_at_import_hurts_no_plan(fake, tmp_path, source, said):
    site = fake()
    module = site / "fake_plugin" / "__init__.py"
    module.write_text(source + "\n" + module.read_text())
    plan = Plan(jobs=[{"paper": ["fake"], "grid": {"epochs": [2, 3]}}, {"paper": ["lars-skip"]}])
    if said:
        with pytest.raises(LayerlabError, match=rf"job 1: Plugin 'fake' .* is broken \({said}\); mend or uninstall"):
            jobs_of(plan, tmp_path)
    else:
        assert [job.changed for job in jobs_of(plan, tmp_path)] == [{"epochs": 2}, {"epochs": 3}, {}]
    assert "fake_plugin" not in sys.modules


def test_a_plan_is_checked_without_torch_in_its_own_process(tmp_path):
    script = ("import sys; from pathlib import Path; from layerlab.runs.batch.plans import Plan, jobs_of; "
              "jobs_of(Plan(jobs=[{'paper': ['lars-skip'], 'grid': {'alpha': [1, 2]}}]), Path()); "
              "print([name for name in ('torch', 'layerlab_lars_skip') if name in sys.modules])")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"


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
