"""Incremental text equals whole text, whatever the tokenizer, and stop strings do not depend on the pieces."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from router.detokenizer import Detokenizer, StopStrings
from router.tokenizer import ByteTokenizer, JsonTokenizer

CORPUS = [
    "The prefill worker hands the baton to the decode worker. It's 42 tokens, isn't it?",
    "  leading spaces,\ttabs\nand newlines\n\n  twice",
    "Grüße aus Köln, 你好世界, こんにちは, привет, 🙂👩‍👩‍👧 e\u0301",
]


@functools.cache
def byte_level(tmp_dir: str) -> JsonTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>", "<|user|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(" added token ", normalized=False), "baton"])
    return saved(tokenizer, f"{tmp_dir}/byte_level.json")


@functools.cache
def sentencepiece_like(tmp_dir: str) -> JsonTokenizer:
    """As Llama 2's: spaces are '▁', characters without a token are byte tokens, one leading space is dropped."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    return saved(tokenizer, f"{tmp_dir}/sentencepiece.json")


def saved(tokenizer: Tokenizer, path: str) -> JsonTokenizer:
    tokenizer.save(path)
    tree = json.loads(Path(path).read_text())
    for token in tree["added_tokens"]:  # byte tokens are ordinary ones
        token["special"] = not token["content"].startswith("<0x") and token["special"]
    Path(path).write_text(json.dumps(tree))
    return JsonTokenizer(Path(path))


@pytest.fixture(scope="module")
def tmp_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("tokenizers"))


def piecewise(detokenizer: Detokenizer, token_ids: Sequence[int]) -> str:
    return "".join([*map(detokenizer.push, token_ids), detokenizer.flush()])


@given(token_ids=st.lists(st.integers(0, 401), max_size=40), skip=st.booleans())
def test_any_byte_level_tokens_give_the_text_of_one_decode(tmp_dir: str, token_ids: list[int], skip: bool) -> None:
    tokenizer = byte_level(tmp_dir)
    pieces = piecewise(tokenizer.detokenizer(skip_special_tokens=skip), token_ids)
    assert tokenizer.decode(token_ids, skip_special_tokens=skip) == pieces


@given(token_ids=st.lists(st.integers(0, 600), max_size=40))
def test_any_tokens_of_the_byte_tokenizer_give_the_text_of_one_decode(token_ids: list[int]) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(token_ids) == piecewise(tokenizer.detokenizer(), token_ids)


@given(text=st.text(max_size=30) | st.sampled_from(CORPUS))
def test_any_text_survives_byte_level_tokens(tmp_dir: str, text: str) -> None:
    tokenizer = byte_level(tmp_dir)
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert text == piecewise(tokenizer.detokenizer(skip_special_tokens=False), token_ids)


@given(texts=st.lists(st.text(max_size=12) | st.sampled_from(CORPUS), max_size=4), skip=st.booleans())
def test_sentencepiece_like_texts_give_the_text_of_one_decode(tmp_dir: str, texts: list[str], skip: bool) -> None:
    tokenizer = sentencepiece_like(tmp_dir)
    token_ids: list[int] = [1]
    for text in texts:
        token_ids += [*tokenizer.encode(text, add_special_tokens=False), 2]
    pieces = piecewise(tokenizer.detokenizer(skip_special_tokens=skip), token_ids)
    assert tokenizer.decode(token_ids, skip_special_tokens=skip) == pieces


def test_a_split_character_is_held_until_it_is_whole() -> None:
    detokenizer = ByteTokenizer().detokenizer()
    assert [detokenizer.push(byte) for byte in "🙂!".encode()] == ["", "", "", "🙂", "!"]


def test_an_incomplete_character_at_the_end_becomes_a_replacement() -> None:
    detokenizer = ByteTokenizer().detokenizer()
    assert detokenizer.push("é".encode()[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_garbage_of_a_windowed_decoder_goes_out_in_bounded_pieces(tmp_dir: str) -> None:
    tokenizer = sentencepiece_like(tmp_dir)
    lone_byte = 3 + 0xFF
    detokenizer = tokenizer.detokenizer()
    assert any(detokenizer.push(lone_byte) for _ in range(40))


# ---- stop strings


def reference_cut(text: str, stops: Sequence[str], include: bool) -> tuple[str, str | None]:
    """The string that ends first, the longest of those."""
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return text, None
    end, _, stop = min(ends)
    return text[: end if include else end - len(stop)], stop


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    include=st.booleans(),
)
def test_stop_strings_cut_where_one_search_of_the_whole_text_would(
    pieces: list[str], stops: list[str], include: bool
) -> None:
    matcher = StopStrings(stops, include=include)
    out = "".join([*map(matcher.push, pieces), matcher.flush()])
    assert reference_cut("".join(pieces), stops, include) == (out, matcher.matched)


def test_what_may_become_a_stop_string_is_held_back_and_nothing_else() -> None:
    matcher = StopStrings(["\n\nUser:"])
    assert [matcher.push(piece) for piece in ("Hello\n", "\nUs", "e", " the")] == ["Hello", "", "", "\n\nUse the"]
    assert matcher.matched is None


def test_the_held_back_text_comes_out_at_the_end() -> None:
    matcher = StopStrings(["END"])
    assert [matcher.push("a E"), matcher.flush()] == ["a ", "E"]


def test_nothing_comes_out_after_a_stop_string() -> None:
    matcher = StopStrings(["."])
    assert [matcher.push("One. Two."), matcher.push(" Three."), matcher.flush()] == ["One", "", ""]
    assert matcher.matched == "."
