"""Text to tokens: a model directory's tokenizer.json, or bytes for the simulated engine. Knows no requests."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

from router.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

_INLINE_CHARS: Final = 2048  # encoding more than this would hold the event loop for over a millisecond


class Tokenizer(Protocol):
    """Text to tokens and back. Thread-safe, immutable."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of `text`; blocks for about 0.5 us per character, without the GIL where it is long."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of all tokens at once."""
        ...

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A fresh incremental decoder."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """One token's own bytes, special tokens included: what `logprobs` shows."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte, no special tokens; ids from 256 on read as `<id>`."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See Tokenizer."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See Tokenizer."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """See Tokenizer."""
        return ByteDetokenizer(self.token_bytes, frozenset())

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        return bytes((token_id,)) if token_id < 256 else f"<{token_id}>".encode()


class JsonTokenizer:
    """A `tokenizer.json` as the `tokenizers` library reads it."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ValueError: it is missing or no tokenizer.
        """
        import tokenizers  # loads a shared library that the simulated engine's router does not need

        if not path.is_file():
            raise ValueError(f"{path} is missing: the model directory must hold a tokenizer.json")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
            decoder = json.loads(path.read_text()).get("decoder") or {}
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._is_byte_level = _is_byte_level(decoder)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """See Tokenizer."""
        if len(text) <= _INLINE_CHARS:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        else:  # only the batch call releases the GIL
            ids = self._tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return list(ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See Tokenizer."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """See Tokenizer."""
        skipped = self._special if skip_special_tokens else frozenset()
        if self._is_byte_level:
            return ByteDetokenizer(self.token_bytes, skipped)
        return WindowDetokenizer(functools.partial(self.decode, skip_special_tokens=False), skipped)

    @functools.lru_cache(maxsize=1 << 18)  # noqa: B019  (one tokenizer lives as long as its process)
    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if not self._is_byte_level:
            return self.decode([token_id], skip_special_tokens=False).encode()
        try:
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        except KeyError:  # an added token: its text is itself
            return bytes(token.encode())


class TextEncoder:
    """Encodes off the event loop where that takes long. Event loop only; `close` when done."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenize")

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The tokens of `text`."""
        work = functools.partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        if len(text) <= _INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Take no more work; does not wait."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def load_tokenizer(model_dir: str) -> Tokenizer:
    """The tokenizer of a model directory; the byte tokenizer for "".

    Raises:
        ValueError: the directory has none that can be read.
    """
    return JsonTokenizer(Path(model_dir) / "tokenizer.json") if model_dir else ByteTokenizer()


def _is_byte_level(decoder: dict[str, Any]) -> bool:
    """True if a token's text never depends on its neighbours, so that bytes can simply be joined."""
    if decoder.get("type") == "Sequence":
        return all(_is_byte_level(part) for part in decoder["decoders"])
    return bool(decoder.get("type") == "ByteLevel")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte (Radford et al. 2019, bytes_to_unicode), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER: Final = _byte_alphabet()
