"""Every benchmark of this folder on this machine, written to results/benchmarks.md with machine, commit and spread.

Run: python benchmarks/all.py [NAME …] [--to results/benchmarks.md]
Each is run by itself, nothing beside it. What is named is measured anew, sections of others stay as they are, as does
that of one that fails; without names, all are (about an hour on two cores). Datasets come from $LAYERLAB_DATA,
airbench from its clone in ../cifar10-airbench.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from layerlab import LayerlabError, files
from layerlab.measure import commit, machine_name, versions, versions_text

HERE = Path(__file__).resolve().parent
SCRIPTS = {file.stem: file for file in sorted(HERE.glob("*.py")) if file != Path(__file__).resolve()}
# What a benchmark measures twice, under other circumstances.
MORE = {"comm_overlap": [["--workers", "2"], ["--workers", "4"]]}
HEAD = """# Benchmarks

Speed and memory as ratios, by turns, with their spread; `make benchmarks` measures all of them anew, `python
benchmarks/all.py NAME` one. Absolute times belong to the machine that is named.
"""


def measured(name: str, at: str) -> str:
    """A benchmark's section: what it measures, its goal, where and when it ran, at which commit, what it printed.

    Raises:
        LayerlabError: it failed.
    """
    about = ast.get_docstring(ast.parse(SCRIPTS[name].read_text())) or ""
    what, _, rest = about.partition("\n\n")
    goal = " ".join(line for line in rest.splitlines() if not line.startswith("Run:"))
    parts = [f"## {name}", " ".join(what.split()), " ".join(goal.split())]
    for arguments in MORE.get(name, [[]]):
        words = ["python", f"benchmarks/{name}.py", *arguments]
        start = time.perf_counter()
        ended = subprocess.run([sys.executable, *words[1:]], cwd=HERE.parent, capture_output=True, text=True)
        text = ended.stdout.strip()
        if ended.returncode:
            last = ended.stderr.strip().rpartition("\n")[2]
            raise LayerlabError(f"{' '.join(words)} ended with status {ended.returncode} ({last}); mend that and "
                                "run it again.")
        parts += [f"`{' '.join(words)}`, {datetime.now(UTC):%Y-%m-%d}, commit `{at}`, "
                  f"{machine_name()}, {time.perf_counter() - start:.0f} s; {versions_text(versions(plugins=False))}",
                  f"```\n{text}\n```"]
        print(f"{' '.join(words)}\n{text}\n", flush=True)
    return "\n\n".join(parts) + "\n"


def write_sections(file: Path, sections: dict[str, str]) -> None:
    """The whole page."""
    whole = "\n".join([HEAD, *(sections[name].rstrip() + "\n" for name in sorted(sections))])
    files.write_atomically(file, lambda stream: stream.write(whole.encode()))


def main() -> None:
    """Measure and write, a section after each benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--to", type=Path, default=HERE.parent / "results" / "benchmarks.md")
    chosen = parser.parse_args()
    for name in chosen.names:
        if name not in SCRIPTS:
            parser.error(f"there is no benchmark {name!r}; choose from {', '.join(SCRIPTS)}")
    # Before the page is written, which changes the tree.
    at, failed = commit(HERE.parent), False
    for name in chosen.names or SCRIPTS:
        try:
            section = measured(name, at)
        except LayerlabError as error:
            print(error, file=sys.stderr)
            failed = True
            continue
        text = chosen.to.read_text() if chosen.to.exists() else HEAD
        sections = {match[2]: match[1] for match in re.finditer(r"^(## (\w+)\n.*?)(?=^## |\Z)", text, re.M | re.S)}
        sections[name] = section
        write_sections(chosen.to, sections)
    sys.exit(failed)


if __name__ == "__main__":
    main()
