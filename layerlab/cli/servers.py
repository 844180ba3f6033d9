"""The commands that start JupyterLab and MLflow's page, on this machine alone and at a free port."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import click

from layerlab.base.errors import LayerlabError
from layerlab.base.files import write_atomically

HOST = "127.0.0.1"
# How many ports are tried from the usual one on.
_TRIED = 100

_port = click.option("--port", type=click.IntRange(1, 65535), help="The port (default: the usual one, or the next "
                                                                   "that is free).")


def free_port(wanted: int | None, usual: int) -> int:
    """A port of this machine that nobody listens on.

    Args:
        wanted: what a person asks for; nothing else will do.
        usual: the first that is tried otherwise.

    Raises:
        LayerlabError: the wanted one is taken, or a hundred are.
    """
    for port in [wanted] if wanted else range(usual, usual + _TRIED):
        with socket.socket() as tried:
            # As servers do, so that one that has just ended is not in the way.
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((HOST, port))
            except OSError:
                continue
            return port
    taken = f"Port {wanted} is" if wanted else f"The ports {usual} to {usual + _TRIED - 1} are"
    raise LayerlabError(f"{taken} taken on this machine; give another one with --port.")


def lay_out_notebooks(home: Path) -> list[Path]:
    """Put the notebooks that the core carries into a workbook that has none of them; gives those that are new.

    Args:
        home: the workbook's folder.
    """
    made = []
    for source in sorted(files("layerlab.reporting").joinpath("notebooks").iterdir(), key=lambda each: each.name):
        target = home / "notebooks" / source.name
        if source.name.endswith(".ipynb") and not target.exists():
            _copy(source.read_bytes(), target)
            made.append(target)
    return made


def _copy(content: bytes, target: Path) -> None:
    write_atomically(target, lambda stream: stream.write(content))


def lab_command(port: int, home: Path, browser: bool) -> list[str]:
    """What starts JupyterLab on a workbook's notebooks; it asks nobody for news or updates."""
    return [
        sys.executable, "-m", "jupyterlab", "--ip", HOST, f"--port={port}", "--ServerApp.port_retries=0",
        f"--notebook-dir={home / 'notebooks'}", "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
        *([] if browser else ["--no-browser"]),
    ]


def ui_command(port: int) -> list[str]:
    """What starts MLflow's page; where its runs are stands in the environment, since an address may hold a password."""
    return [sys.executable, "-m", "mlflow", "ui", "--host", HOST, "--port", str(port)]


def _become(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run a server in the place of this process, so that whoever ends this one ends the server."""
    if os.name == "posix":
        sys.stdout.flush()
        os.execve(command[0], list(command), dict(environment))
    raise SystemExit(subprocess.call(list(command), env=dict(environment)))


@click.command()
@_port
@click.option("--browser/--no-browser", default=True, help="Open a window of the browser (default: yes).")
def lab(port: int | None, browser: bool) -> None:
    """Start JupyterLab on the notebooks of this workbook.

    In a folder without notebooks, explore, compare and scoreboard are put there first. It listens on 127.0.0.1 alone.
    """
    from layerlab.runs.record import workbook_folder

    home = workbook_folder()
    made = lay_out_notebooks(home)
    if made:
        click.echo(f"New in {home / 'notebooks'}: {', '.join(file.name for file in made)}", err=True)
    chosen = free_port(port, 8888)
    click.echo(f"JupyterLab: http://{HOST}:{chosen} (Ctrl-C ends it)", err=True)
    _become(lab_command(chosen, home, browser), {
        **os.environ, "LAYERLAB_HOME": str(home)})


@click.command()
@_port
def ui(port: int | None) -> None:
    """Start MLflow's page on the runs of this workbook. It listens on 127.0.0.1 alone."""
    from layerlab.runs import tracking

    uri = tracking.tracking_uri()
    if uri.startswith("http"):
        raise LayerlabError("MLFLOW_TRACKING_URI names a server, which shows its runs itself; open its address in a "
                            "browser.")
    # Made, or brought up to date, before a second process reads it.
    tracking.client()
    chosen = free_port(port, 5000)
    click.echo(f"MLflow: http://{HOST}:{chosen} (Ctrl-C ends it)", err=True)
    _become(ui_command(chosen), {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri})
