# SPDX-License-Identifier: Apache-2.0
"""Fenced blocks of the documentation's pages, and what the comments before them say.

A comment on the line before a block says why ``test_docs_blocks.py`` does not run it (``needs: data``, ``GPU``,
``network``, ``cluster``, ``display``) or what runs it (``runs: make demo``, ``runs: tests/...``); ``file: PATH`` says
where a reader is to save it. A test that runs blocks takes them from the page, by ``blocks_run_by``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# First words of the untagged blocks that are commands; others are listings of files.
PROGRAMS = {
    "volta3d",
    "python",
    "make",
    "torchrun",
    "mlflow",
    "pip",
    "clinica",
    "export",
    "docker",
    "git",
    "curl",
    "cd",
}
# Pages whose every block another test runs, on data of its own.
RUN_ELSEWHERE = {"docs/python.md": "tests/integration/test_docs_python.py"}


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: the page's path within the repository.
        line: number of its first line.
        language: ``bash``, ``python``, ``json``, ``text`` or another tag.
        text: its content, without the fence's indentation.
        marks: what the comment before it says, such as ``{"needs": "data"}``.
    """

    page: str
    line: int
    language: str
    text: str
    marks: Mapping[str, str]

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_run_here(self) -> bool:
        return self.is_code and not self.calls_make and not {"needs", "runs"} & self.marks.keys()

    @property
    def is_code(self) -> bool:
        return self.language in {"bash", "python"} and self.page not in RUN_ELSEWHERE

    @property
    def calls_make(self) -> bool:
        """Targets set up whole environments: never run from here."""
        return self.language == "bash" and any(words[0] == "make" for words in commands_of(self.text))


def read_blocks(text: str, page: str) -> list[Block]:
    """Fenced blocks of a page, also those indented in lists."""
    blocks: list[Block] = []
    marks: dict[str, str] = {}
    fence: tuple[int, str, int] | None = None
    content: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if fence is None:
            if stripped.startswith("```"):
                fence, content = (len(line) - len(line.lstrip()), stripped[3:].strip(), number), []
                continue
            comment = re.fullmatch(r"<!-- (\w+): (.+?) -->", stripped)
            marks = {comment[1]: comment[2]} if comment else {}
        elif stripped == "```":
            indent, language, start = fence
            code = "\n".join(row[indent:] for row in content) + "\n"
            if not language:
                first = (code.split() or [""])[0]
                language = "bash" if first in PROGRAMS else "text"
            blocks.append(Block(page, start + 1, {"sh": "bash"}.get(language, language), code, marks))
            fence, marks = None, {}
        else:
            content.append(line)
    assert fence is None, f"{page}: the block that begins at line {fence and fence[2]} does not end"
    return blocks


def blocks_run_by(page: str, test: str) -> list[Block]:
    """Blocks of a page that say that a test runs them.

    Args:
        page: its path within the repository.
        test: what the mark says, such as ``make test-label``.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for block in read_blocks(text, page) if block.marks.get("runs") == test]


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command in a shell text: lines joined, ``&&`` and the like taken apart, variables dropped."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        lexer = shlex.shlex(re.sub(r"(^|\s)#[^'\"]*$", "", line), posix=True, punctuation_chars="&;|")
        lexer.commenters = ""  # within a word, as in views#mask, it begins no comment
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word and set(word) <= set("&;|"):
                while words and (re.match(r"[A-Za-z_]\w*=", words[0]) or words[0] in {"srun", "export"}):
                    words = words[1:]
                if words:
                    yield words
                words = []
            else:
                words.append(word)
