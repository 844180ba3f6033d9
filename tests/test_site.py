"""The built site: whole, read as GitHub reads the same pages, and nothing on it comes from elsewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from helpers import slow
from pages import PUBLISHED, ROOT, WRITTEN, tokens

import layerlab
import layerlab.testing

# Elements as Markdown's parser calls them → as HTML does.
KINDS = {"table_open": "table", "fence": "pre", "code_block": "pre", "list_item_open": "li", "image": "img",
         "blockquote_open": "blockquote", "heading_open": "h",
         "bullet_list_open": "ul", "ordered_list_open": "ol"}
# Made by mkdocstrings, of which a Markdown parser sees one line each.
REFERENCE = "docs/reference/"


class Elements(HTMLParser):
    """What a page of the site has: anchors, links, what it loads, and elements in its text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.counts: Counter[str] = Counter()
        self._inside = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors |= {value for value in (values.get("id"), values.get("name")) if value}
        if tag == "article":
            self._inside = True
        if self._inside:
            self.counts[re.sub(r"^h[1-6]$", "h", tag)] += 1
        if tag == "a" and values.get("href"):
            self.links.append(str(values["href"]))
        if tag in ("script", "img", "source", "iframe") and values.get("src"):
            self.loads.append(str(values["src"]))
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loads.append(str(values["href"]))

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._inside = False


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site as `make docs` builds it, warnings being errors."""
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="needs the extra `docs`: pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("built") / "site"
    environment = {**os.environ, "GITHUB_REPOSITORY": "someone/workbook", "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
                          cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def pages(site) -> dict[str, Elements]:
    return {page.relative_to(site).as_posix(): Elements(page) for page in sorted(site.rglob("*.html"))}


def place(page: str) -> str:
    """Where a page of the repository is on the site."""
    page = "index.md" if page == "README.md" else page.removeprefix("docs/")
    return re.sub(r"(README|index)\.md$", "index.html", page).replace(".md", ".html")


@slow
def test_every_page_is_on_the_site(pages):
    scaffold = {page for page in WRITTEN if page.startswith("layerlab/")}
    for page in {*WRITTEN, *PUBLISHED} - scaffold:
        assert place(page) in pages, page


@slow
def test_every_link_of_the_site_arrives(site, pages):
    wrong = []
    for page, elements in pages.items():
        for link in (*elements.links, *elements.loads):
            address = urlsplit(link)
            if address.scheme or address.netloc or page == "404.html":
                continue
            file = ((site / page).parent / unquote(address.path)).resolve() if address.path else site / page
            name = file.relative_to(site).as_posix() if file.is_relative_to(site) else ""
            if not file.is_file() or (address.fragment and unquote(address.fragment) not in {
                    "__codelineno", *(pages[name].anchors if name in pages else ())}):
                wrong.append(f"{page}: {link}")
    assert wrong == []


@slow
def test_nothing_is_loaded_from_elsewhere(site, pages):
    assert [(page, load) for page, elements in pages.items() for load in elements.loads if "//" in load] == []
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", style.read_text()) == [], style
    assert all(elements.counts["article"] for page, elements in pages.items())


@slow
def test_every_public_name_is_described_once(pages):
    listed = pages["reference/index.html"].links
    for name in layerlab.__all__:
        described = [page for page, elements in pages.items() if f"layerlab.{name}" in elements.anchors]
        in_contract = listed.count(f"../contract.html#{name.lower()}")
        assert len(described) + in_contract == 1, (name, described)
    for page, module in (("measure", layerlab.measure), ("testing", layerlab.testing)):
        for name in module.__all__:
            assert f"layerlab.{page}.{name}" in pages[f"reference/{page}.html"].anchors


@slow
@pytest.mark.parametrize("page", [page for page in (*WRITTEN, *PUBLISHED)
                                  if not page.startswith(("layerlab/", REFERENCE))])
def test_the_site_reads_a_page_as_github_does(page, pages):
    """Python's Markdown knows other lists and blocks than GitHub's: as many elements of each kind."""
    wanted = Counter(KINDS[token.type] for outer in tokens(page) for token in (outer, *(outer.children or ()))
                     if token.type in KINDS)
    if page == "README.md":
        # Badges are for GitHub.
        text = (ROOT / page).read_text()
        wanted["img"] -= text.partition("<!-- badges -->")[2].partition("<!-- /badges -->")[0].count("![")
    counts = pages[place(page)].counts
    assert {kind: counts[kind] for kind in wanted} == dict(wanted)


@slow
def test_links_publish_no_file_that_git_does_not_hold(site):
    """Such as git's own settings, or what lies beside the checkout."""
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = "results/lars-skip/README.md"
    assert hook.target_of("results/README.md", "lars-skip/README.md#claims") == (page, "#claims")
    for link in ("../.git", "../.git/config", "../../main/README.md", "/etc/passwd", "../docs/__pycache__/x.pyc"):
        assert hook.target_of("results/README.md", link) is None, link


@slow
def test_addresses_of_the_repository_are_known_where_it_is(site):
    text = (site / "start.html").read_text()
    assert "https://mybinder.org/v2/gh/someone/workbook/HEAD" in text
    assert "https://someone.github.io/workbook/wheels.txt" in text
    assert "OWNER" not in text
    assert 'href="https://colab.research.google.com/github/someone/workbook/blob/HEAD/notebooks/explore.ipynb"' in text
