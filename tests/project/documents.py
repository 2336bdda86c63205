"""The documents as tests see them: which there are, their code blocks, links and headings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.ranks import ROOT

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "slurm/*.md", "kubernetes/*.md", ".github/**/*.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.DOTALL | re.M
)


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        document: relative to the repository.
        line: where it begins.
        note: the comment on the line before it, if any.
    """

    document: str
    line: int
    language: str
    note: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def blocks(*languages: str) -> list[Block]:
    """Every code block of these languages, in the order of the documents."""
    return [
        block for name in DOCUMENTS for block in _blocks_of(name) if block.language in languages
    ]


def _blocks_of(document: str) -> Iterator[Block]:
    text = text_of(document)
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        note = match["note"] or ""
        yield Block(document, line, match["language"], note, match["text"])


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))


def commands() -> list[list[str]]:
    """Every command of the shell blocks, and behind `$ ` in what terminals show; in words. (A block
    with a note is a script, which a test runs.)"""
    lines = [line for block in blocks("bash") if not block.note for line in joined(block.text)]
    for block in blocks(""):
        lines += [line[2:] for line in joined(block.text) if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in map(_without_variables, found) if words]


def joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def _without_variables(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def anchors(path: Path) -> set[str]:
    """What a link may name behind `#` in a document, as GitHub makes it of headings."""
    found: dict[str, int] = {}
    names = set()
    for title in re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text()), re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        name = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        count = found[name] = found.get(name, -1) + 1
        names.add(f"{name}-{count}" if count else name)
    return names
