"""Hook of mkdocs: the site's pages outside docs/ are the repository's own files, read where they lie.

What a page links to is on the site: a Markdown file as a page, any other file as it is. Links keep working, since each
is rewritten from the place in the repository to the place on the site.
"""

from __future__ import annotations

import os
import posixpath
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from layerlab.show.interval import unbroken

ROOT = Path(__file__).resolve().parents[1]
# A fenced block (left alone), or a link or image with its target.
LINK = re.compile(r"^(?P<fence>```+|~~~+).*?^(?P=fence)|(?P<before>\]\()(?P<target>[^)\s]+)(?=[)\s])", re.M | re.S)
SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*:|^//|^#|^\?")
# Badges and links that only GitHub can resolve.
GITHUB_ONLY = re.compile(r"<!-- badges -->.*?<!-- /badges -->\n*", re.S)
# An address that names the repository, and what tells readers to put its name there: where it is known, a link.
ADDRESS = re.compile(r"`?https://[^\s`]*\bOWNER\b[^\s`]*`?")
UNKNOWN = re.compile(r"<!-- repository -->.*?<!-- /repository -->\n*", re.S)
# Code, which is left alone where lines are kept from being broken.
CODE = re.compile(r"(<pre\b.*?</pre>|<code\b.*?</code>)", re.S)


def site_place(file: str) -> str:
    """Where a file of the repository stands on the site; both are POSIX paths from the root."""
    if file == "README.md":
        return "index.md"
    return file.removeprefix("docs/")


def repository_place(page: str) -> str:
    """The opposite of `site_place`."""
    if page == "index.md":
        return "README.md"
    return f"docs/{page}" if (ROOT / "docs" / page).is_file() else page


@cache
def committable() -> frozenset[str]:
    """The files that git holds or would add. A page may come from anybody, and its links publish nothing else.

    Raises:
        PluginError: this is no checkout of git.
    """
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise PluginError(f"git does not list this folder's files ({done.stderr.strip()}); build the site in a clone.")
    return frozenset(done.stdout.split("\0"))


def linked(file: str) -> Iterator[str]:
    """The files of the repository that a Markdown file links to, its figures among them."""
    for match in LINK.finditer((ROOT / file).read_text(encoding="utf-8")):
        if target := target_of(file, match["target"] or ""):
            yield target[0]


def target_of(file: str, link: str) -> tuple[str, str] | None:
    """(file of the repository, `#anchor` or nothing) that a link in a file names; None if it names none."""
    if not link or SCHEME.match(link):
        return None
    path, mark, anchor = link.partition("#")
    place = posixpath.normpath(posixpath.join(posixpath.dirname(file), unquote(path)))
    return (place, mark + anchor) if place in committable() and (ROOT / place).is_file() else None


def reachable(start: list[str]) -> set[str]:
    """The files, and all that pages among them link to, however far."""
    found: set[str] = set()
    left = list(start)
    while left:
        file = left.pop()
        if file not in found:
            found.add(file)
            left += linked(file) if file.endswith(".md") else []
    return found


def papers() -> list[dict[str, Any]]:
    """The menu's entries of the papers: of each plugin in the repository its results and its card."""
    entries: list[dict[str, Any]] = []
    for card in sorted(ROOT.glob("plugins/*/README.md")):
        name = card.parent.name
        results = f"results/{name}/README.md"
        pages = [{"Results": results}] if (ROOT / results).is_file() else []
        entries.append({name: [*pages, {"Method card": f"plugins/{name}/README.md"}]})
    return entries


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the papers into the menu, at the entry `Papers`, and where it is known the repository below each page."""
    for entry in config.nav or ():
        if isinstance(entry, dict) and "Papers" in entry:
            entry["Papers"] += papers()
    if repository := os.environ.get("GITHUB_REPOSITORY"):
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": f"{server}/{repository}"}]
    return config


def menu(entries: Any) -> Iterator[str]:
    """The pages that a menu names."""
    match entries:
        case str():
            yield entries
        case dict():
            yield from menu(list(entries.values()))
        case list():
            for entry in entries:
                yield from menu(entry)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that the menu's pages link to, however far."""
    start = [repository_place(page) for page in menu(config.nav)]
    if missing := [page for page in start if not (ROOT / page).is_file()]:
        raise PluginError(f"mkdocs.yml names pages that are not there: {', '.join(missing)}")
    for file in sorted(reachable(start)):
        place = site_place(file)
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page as the site shows it: links to places on the site, folded parts as Markdown, no badges."""
    file = repository_place(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = target_of(file, match["target"] or "")
        if target is None:
            return match[0]
        place = posixpath.relpath(site_place(target[0]), posixpath.dirname(page.file.src_uri) or ".")
        return f"{match['before']}{quote(place)}{target[1]}"

    text = LINK.sub(rewritten, GITHUB_ONLY.sub("", markdown)).replace("<details>", '<details markdown="1">')
    repository = os.environ.get("GITHUB_REPOSITORY")
    return named(text, repository) if repository else text


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """No line of the site ends within a number with its interval and unit."""
    parts = CODE.split(html)
    # Every second part is code.
    parts[::2] = map(unbroken, parts[::2])
    return "".join(parts)


def named(text: str, repository: str) -> str:
    """A page with the repository's own account and name in its addresses."""
    owner, _, name = repository.partition("/")

    def address(match: re.Match[str]) -> str:
        known = match[0].replace("OWNER", owner).replace("NAME", name)
        return f"<{known.strip('`')}>" if known.startswith("`") else known

    return ADDRESS.sub(address, UNKNOWN.sub("", text))
