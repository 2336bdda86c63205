"""What people are shown of a text that others may have chosen: names of files, metrics, runs."""

from __future__ import annotations

import os
import shlex
import unicodedata
from collections.abc import Sequence

# Control and format characters (ESC, C1, bidirectional overrides, …), lone surrogates (bytes of a
# file's name that are no text), private ones, separators of lines and paragraphs.
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


def printable(text: str) -> str:
    """The text on one line, with everything that steers a terminal, or is not seen, escaped."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(c) if unicodedata.category(c) in HIDDEN else c for c in text)


def quoted(path: str | os.PathLike[str]) -> str:
    """A path, or an address, as a person pastes it behind a command into a shell.

    What is not seen is written as `$'…'` has it, which a plain sh does not know.
    """
    text = os.fspath(path)
    text = f"./{text}" if text.startswith("-") else text  # or it would be an option
    if printable(text) == text:
        return shlex.quote(text)
    return "$'" + "".join(map(_in_quotes, text)) + "'"


def first_few(texts: Sequence[str], separator: str = ", ", at_most: int = 5) -> str:
    """Many texts as one: some of them, and how many more there are."""
    more = [f"and {len(texts) - at_most:,} more"] if len(texts) > at_most else []
    return separator.join([*texts[:at_most], *more])


def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # as Python keeps a byte that is no text
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode()


def _in_quotes(character: str) -> str:
    if character in "\\'":
        return f"\\{character}"
    if printable(character) == character:
        return character
    is_byte = 0xDC80 <= ord(character) <= 0xDCFF  # as Python keeps one that is no text
    errors = "surrogateescape" if is_byte else "surrogatepass"
    return "".join(f"\\x{byte:02x}" for byte in character.encode(errors=errors))
