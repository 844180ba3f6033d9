"""The pages of the repository as a Markdown parser reads them: blocks of code, links, headings, spans of code."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
# Written by people. The published pages are written by `layerlab publish`: of them only the links are looked at.
WRITTEN = tuple(sorted(
    str(file.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "plugins/README.md", "plugins/*/README.md", "tests/outside/*/README.md",
                    "layerlab/cli/scaffold/*/README.md")
    for file in ROOT.glob(pattern)))
PUBLISHED = tuple(sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("results/**/*.md")))
# Why a block is not run, in the line above it: `compiled only` never, `slow` by `make test-all` alone.
REASON = re.compile(r"^<!-- (compiled only|slow): (\S.*) -->$")


@dataclass(frozen=True)
class Block:
    """A fenced block of code, with the line of the page it begins in and how it is held to run."""

    page: str
    line: int
    language: str
    text: str
    how: str = "run"

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def tokens(page: str) -> tuple[Token, ...]:
    return tuple(MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8")))


@cache
def blocks(page: str) -> tuple[Block, ...]:
    """The blocks of code of a page, in their order."""
    found: list[Block] = []
    before = None
    for token in tokens(page):
        if token.type == "fence" and token.map:
            reason = REASON.match(before.content.strip()) if before and before.type == "html_block" else None
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content,
                               reason[1] if reason else "run"))
        before = token
    return tuple(found)


def written_blocks(*languages: str) -> list[Block]:
    """The blocks of all written pages in one of the languages."""
    return [block for page in WRITTEN for block in blocks(page) if block.language in languages]


def inline(page: str, kind: str) -> Iterator[Token]:
    """What stands within the paragraphs and tables of a page: `link_open`, `image`, `code_inline`."""
    for token in tokens(page):
        yield from (child for child in token.children or () if child.type == kind)


def links(page: str) -> Iterator[str]:
    """The targets of links and images, percent-encoding undone."""
    for kind, name in (("link_open", "href"), ("image", "src")):
        yield from (unquote(str(token.attrs[name])) for token in inline(page, kind))


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def anchors(page: str) -> frozenset[str]:
    """The anchors of a page: of its headings, and of the names that a page of the reference describes."""
    found: set[str] = set()
    for token, after in zip(tokens(page), tokens(page)[1:], strict=False):
        if token.type == "heading_open":
            name = anchor("".join(child.content for child in after.children or ()))
            found.add(next(each for each in (name, *(f"{name}-{n}" for n in range(1, 99))) if each not in found))
    text = (ROOT / page).read_text(encoding="utf-8")
    return frozenset(found | set(re.findall(r"^::: (\S+)$", text, re.M)))
