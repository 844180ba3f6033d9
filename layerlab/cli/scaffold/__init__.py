"""`layerlab new`: a plugin to start from, in the shape of ours, which works as it stands.

What is written is the plugin in the folder `my-method` beside this file, under another name.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import re
import tempfile
from pathlib import Path

from layerlab.base.errors import LayerlabError

TEMPLATE = Path(__file__).parent / "my-method"
NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def new_plugin(name: str, folder: Path, title: str = "") -> Path:
    """Write a plugin.

    Args:
        name: of the strategy: small letters, digits and dashes, such as `my-method`.
        folder: where the plugin's own folder, called `name`, is made.
        title: of the paper. Default: the name in words.

    Returns:
        The plugin's folder.

    Raises:
        LayerlabError: a name that cannot be one or that is taken, a folder that is there already or cannot be
            written; nothing is written then.
    """
    names = _names(name, title)
    _check_free(name, names["layerlab_my_method"])
    if not folder.is_dir():
        raise LayerlabError(f"There is no folder {folder} to put the plugin in; make it, or give another --folder.")
    target = folder / name
    if target.exists():
        raise LayerlabError(f"{target} is there already; choose another name or another --folder.")
    try:
        # Beside its place, so that the whole appears at once.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".layerlab-new-") as temporary:
            made = Path(temporary) / name
            _write(made, names)
            made.rename(target)
    except OSError as error:
        raise LayerlabError(f"The plugin cannot be written into {folder} ({error.strerror}); choose another --folder."
                            ) from None
    return target


def _names(name: str, title: str) -> dict[str, str]:
    """What stands in the template → what is to stand there.

    Raises:
        LayerlabError: a name of another form.
    """
    if not NAME.fullmatch(name):
        raise LayerlabError(f"{name!r} is no name for a strategy; take small letters, digits and single dashes, "
                            "a letter first, such as my-method.")
    kind = "".join(part.capitalize() for part in name.split("-"))
    # The class must not take the name of something that its module imports, or of Python's own.
    imports = re.findall(r"^from \S+ import (.*)", (TEMPLATE / "layerlab_my_method" / "strategy.py").read_text(), re.M)
    if kind in dir(builtins) or kind in ", ".join(imports).split(", "):
        kind += "Method"
    words = " ".join(title.split()) or name.replace("-", " ").capitalize()
    return {"layerlab_my_method": f"layerlab_{name.replace('-', '_')}", "my_method": name.replace("-", "_"),
            "my-method": name, "MyMethod": kind, "My method": words}


def _check_free(name: str, package: str) -> None:
    """Raises: LayerlabError: something installed has the name."""
    from layerlab.contract.registry import strategies

    if name in strategies:
        owner = " and ".join(plugin.distribution for plugin in strategies.every() if plugin.name == name)
        raise LayerlabError(f"A strategy named {name!r} is installed already, by {owner}; choose another name.")
    taken = importlib.util.find_spec(package) is not None
    try:
        importlib.metadata.distribution(f"layerlab-{name}")
        taken = True
    except importlib.metadata.PackageNotFoundError:
        pass
    if taken:
        raise LayerlabError(f"A package {package!r} is installed already; choose another name.")


def _write(folder: Path, names: dict[str, str]) -> None:
    """Copy the template with its names replaced, in what the files hold and in what they are called."""
    found = re.compile("|".join(map(re.escape, names)))

    def renamed(text: str) -> str:
        return found.sub(lambda match: names[match[0]], text)

    def written(match: re.Match[str]) -> str:
        # Inside a string of JSON or TOML, which escape alike.
        return json.dumps(names[match[0]], ensure_ascii=False)[1:-1]

    for source in sorted(path for path in TEMPLATE.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        target = folder / renamed(str(source.relative_to(TEMPLATE)))
        target.parent.mkdir(parents=True, exist_ok=True)
        text = source.read_text(encoding="utf-8")
        quoted = source.suffix in (".toml", ".ipynb")
        target.write_text(found.sub(written, text) if quoted else renamed(text), encoding="utf-8")
