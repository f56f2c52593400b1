"""A tokenizer for models without one: a word for every id."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models


def write_tokenizer(vocab_size: int, directory: Path) -> None:
    """tokenizer.json with the words t0, t1, ...: every id is visible text."""
    words = {f"t{index}": index for index in range(vocab_size)}
    Tokenizer(models.WordLevel(words, unk_token="t0")).save(str(directory / "tokenizer.json"))
