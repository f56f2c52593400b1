"""Tokens to text, incrementally: detokenizers and stop strings. Knows no tokenizer files and no requests.

What is emitted never changes afterwards, and everything emitted, `flush` included, equals one decode of all tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """The text of one sequence of tokens so far. One per choice; not shared."""

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes: empty while a character is still in parts."""
        ...

    def flush(self) -> str:
        """What is left at the end: an incomplete character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For vocabularies whose tokens are byte strings (byte-level BPE, the byte tokenizer)."""

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: frozenset[int]) -> None:
        self._token_bytes = token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        return "" if token_id in self._skipped else self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        """See Detokenizer."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any other decoder (SentencePiece-like): decodes a short window twice and emits the difference.

    The window starts with tokens whose text is out already: they supply the context by which decoders place
    spaces. A window that ends in U+FFFD may be an incomplete character and waits for the next token.
    """

    _MAX_HELD = 32  # tokens; longer runs are no character but garbage, and go out as they are

    def __init__(self, decode: Callable[[Sequence[int]], str], skipped: frozenset[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        self._window: list[int] = []
        self._num_emitted = 0  # tokens at the window's start whose text is out
        self._emitted = ""  # that text, decoded without what follows

    def push(self, token_id: int) -> str:
        """See Detokenizer."""
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        held = len(self._window) - self._num_emitted
        if text.endswith("\ufffd") and held < self._MAX_HELD:
            return ""
        delta = text[len(self._emitted) :]
        self._window = self._window[self._num_emitted :]
        self._num_emitted = len(self._window)
        self._emitted = self._decode(self._window)
        return delta

    def flush(self) -> str:
        """See Detokenizer."""
        text = self._decode(self._window)[len(self._emitted) :]
        self._window, self._num_emitted, self._emitted = [], 0, ""
        return text


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces, and holds back what may become one.

    First means: the one that ends first, the longer one of two that end together; so the result does not depend on
    the pieces. One Knuth-Morris-Pratt automaton per string: linear in the text, whatever the strings are.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        self._strings = sorted(strings, key=len, reverse=True)
        self._include = include
        self._fallbacks = [_prefix_function(string) for string in self._strings]
        self._states = [0] * len(self._strings)  # per string: how much of it the text's end matches
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """What may go out of the text so far; nothing more once `matched` is set."""
        if self.matched is not None:
            return ""
        buffer = self._held + text
        for position in range(len(self._held), len(buffer)):
            string = self._advance(buffer[position])
            if string is not None:
                self.matched, self._held = string, ""
                end = position + 1
                return buffer[: end if self._include else end - len(string)]
        num_held = max(self._states, default=0)
        self._held = buffer[len(buffer) - num_held :]
        return buffer[: len(buffer) - num_held]

    def flush(self) -> str:
        """The held-back text, when no more comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        found = None
        for index, string in enumerate(self._strings):
            state, fallback = self._states[index], self._fallbacks[index]
            while state and string[state] != character:
                state = fallback[state - 1]
            if string[state] == character:
                state += 1
            if state == len(string):
                if found is None:
                    found = string
                state = fallback[state - 1]
            self._states[index] = state
        return found


def _prefix_function(string: str) -> list[int]:
    """[i]: length of the longest proper prefix of string[:i+1] that is also its suffix (Knuth, Morris, Pratt 1977)."""
    table = [0] * len(string)
    length = 0
    for index in range(1, len(string)):
        while length and string[index] != string[length]:
            length = table[length - 1]
        if string[index] == string[length]:
            length += 1
        table[index] = length
    return table
