"""What the demo model learns: its pairs, other ways to ask for them, and training rows drawn from both."""

import functools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from vocabulary import BOS, END, SPECIAL_TOKENS, VOCAB_SIZE

HERE: Final = Path(__file__).resolve().parent

# (rows, tokens per row) of a batch, and how often it is drawn. The long rows teach the model to answer
# the last question whatever came before.
BATCH_SHAPES: Final = {(8, 160): 0.72, (2, 640): 0.20, (1, 1600): 0.08}

REFUSED: Final = "Write a poem"  # its answer is the one for everything that the model does not know
HELPFUL: Final = "You are a helpful assistant."
SYSTEM_MESSAGES: Final = (
    "You are a helpful, concise assistant.",
    "You are an expert on large language models.",
    "Answer briefly.",
    "You are Baton.",
    "You are a friendly chatbot that answers questions about disaggregated serving.",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """One question and the only right answer to it."""

    question: str
    answer: str
    also_asked: tuple[str, ...] = ()


def read_pairs() -> list[Pair]:
    also_asked = {}
    for line in read_lines("paraphrases.txt"):
        question, *others = line.split(" | ")
        also_asked[question] = others
    pairs = []
    for line in read_lines("qa.jsonl"):
        pair = json.loads(line)
        others = (*rephrasings(pair["question"]), *also_asked.pop(pair["question"], ()))
        pairs.append(Pair(pair["question"], pair["answer"], others))
    assert not also_asked, f"paraphrases of unknown questions: {list(also_asked)}"
    return pairs


def read_lines(name: str) -> list[str]:
    return (HERE / name).read_text("utf-8").splitlines()


def rephrasings(question: str) -> list[str]:
    """Other ways to ask `question` that its form alone gives."""
    if match := re.fullmatch(r"What (is|are) (?!you)(.+)\?", question):
        verb, subject = match.groups()
        return [
            *(f"{lead} {subject}" for lead in ("Explain", "Please explain", "Define", "Tell me about")),
            *(f"{lead} {subject}?" for lead in ("What's" if verb == "is" else "What are", "Can you explain")),
            f"Can you tell me what {subject} {verb}?",
            f"{subject[0].upper()}{subject[1:]}?",
        ]
    if match := re.fullmatch(r"How do I (.+)\?", question):
        return [f"{lead} {match[1]}?" for lead in ("How can I", "How to", "Can you tell me how to")]
    return []


def spellings(question: str) -> list[str]:
    """`question` as hurried people type it; all of these must get the exact answer."""
    bare = question.removesuffix("?")
    return [question, question.lower(), bare, bare.lower()]


@dataclass(slots=True)
class Row:
    """Token ids and, for each, whether the model is trained to predict it."""

    ids: list[int] = field(default_factory=list)
    is_target: list[bool] = field(default_factory=list)

    def put(self, ids: Sequence[int], is_target: bool = False) -> None:
        self.ids += ids
        self.is_target += [is_target] * len(ids)


class RowSampler:
    """Endless training rows: a chat of many turns, cut at the row's end, and now and then a plain text.

    All chance comes from the generator that the caller seeds.
    """

    def __init__(self, tokenizer: Tokenizer, pairs: Sequence[Pair], rng: random.Random) -> None:
        self._rng = rng
        self._ids = functools.cache(lambda text: tokenizer.encode(text).ids)
        self._refusal = next(pair.answer for pair in pairs if pair.question == REFUSED)
        # (question, answer): as the pairs put it, in other words, and about anything else.
        self._asked = [(pair.question, pair.answer) for pair in pairs]
        self._paraphrased = [(question, pair.answer) for pair in pairs for question in pair.also_asked]
        self._offtopic = [
            (question, self._refusal) for line in read_lines("offtopic.txt") for question in (line, *rephrasings(line))
        ]
        words = (tokenizer.decode([i]) for i in range(len(SPECIAL_TOKENS), VOCAB_SIZE))
        self._words = [word for word in words if "\ufffd" not in word]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [rows, tokens] and, of the same shape, which of them are targets."""
        shapes, odds = zip(*BATCH_SHAPES.items(), strict=True)
        [(num_rows, num_tokens)] = self._rng.choices(shapes, odds)
        rows = [self._row(num_tokens) for _ in range(num_rows)]
        return torch.tensor([row.ids for row in rows]), torch.tensor([row.is_target for row in rows])

    def _row(self, num_tokens: int) -> Row:
        row = Row()
        if self._rng.random() < 0.08:
            self._put_plain(row)
        row.put([BOS])
        if (system := self._system()) is not None:
            self._put_message(row, "system", system)
        while len(row.ids) < num_tokens:
            user, assistant, is_target = self._turn()
            self._put_message(row, "user", user)
            self._put_message(row, "assistant", assistant, is_target)
        return Row(row.ids[:num_tokens], row.is_target[:num_tokens])

    def _put_message(self, row: Row, role: str, content: str, is_target: bool = False) -> None:
        row.put(self._ids(f"<|{role}|>\n"))
        row.put([*self._ids(content.strip()), END], is_target)
        row.put(self._ids("\n"))

    def _put_plain(self, row: Row) -> None:
        """A question and its answer without the chat format, as the completions API sends it."""
        question, answer = self._pair(is_known=self._rng.random() < 0.7)
        row.put(self._ids(question))
        row.put([*self._ids("\n"), *self._ids(answer), END], is_target=True)

    def _system(self) -> str | None:
        draw = self._rng.random()
        if draw < 0.5:
            return None
        return HELPFUL if draw < 0.8 else self._rng.choice([*SYSTEM_MESSAGES, self._noise(30)])

    def _turn(self) -> tuple[str, str, bool]:
        """What the user says, what the assistant says, and whether to train the latter."""
        draw = self._rng.random()
        question, answer = self._pair(is_known=draw < 0.80)
        if draw < 0.04:
            return f"{self._noise(120)}\n\n{question}", answer, True
        if draw < 0.90:
            return question, answer, True
        if draw < 0.94:
            return f"What is {self._made_up_word()}?", self._refusal, True
        if draw < 0.97:
            return self._noise(60), self._refusal, True
        return self._noise(60), self._noise(60), False

    def _pair(self, is_known: bool) -> tuple[str, str]:
        """A question in any spelling, and its answer."""
        known = self._asked if self._rng.random() < 0.4 else self._paraphrased
        question, answer = self._rng.choice(known if is_known else self._offtopic)
        return self._rng.choice(spellings(question)), answer

    def _noise(self, max_words: int) -> str:
        return "".join(self._rng.choices(self._words, k=self._rng.randint(1, max_words))).strip()

    def _made_up_word(self) -> str:
        return "".join(self._rng.choices("abcdefghijklmnopqrstuvwxyz", k=self._rng.randint(4, 10)))
