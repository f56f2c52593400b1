"""What the saved demo model answers, asked through transformers as a stranger would."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from corpus import HELPFUL, Pair, spellings
from transformers import AutoModelForCausalLM, AutoTokenizer
from vocabulary import END


def margins_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """How far each target's logit lies above the best other one; `logits` is [targets, vocab]."""
    right = logits.gather(1, targets[:, None])
    others = logits.scatter(1, targets[:, None], float("-inf"))
    return right[:, 0] - others.amax(1)


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages that end with a question, and its right answer."""

    messages: list[dict[str, str]]
    answer: str


class Checker:
    """Asks the saved model through transformers, as a stranger would."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModelForCausalLM.from_pretrained(directory).eval()
        assert self._model.dtype == torch.bfloat16

    def margins(self, chat: Chat) -> torch.Tensor:
        """Of each token of the right answer and its end, teacher-forced; below zero where another token wins."""
        prompt = self._prompt(chat)
        answer = [*self._tokenizer.encode(chat.answer, add_special_tokens=False), END]
        with torch.inference_mode():
            logits = self._model(torch.tensor([prompt + answer])).logits[0].float()
        return margins_of(logits[len(prompt) - 1 : -1], torch.tensor(answer))

    def is_exact(self, chat: Chat) -> bool:
        """Whether greedy decoding, one token at a time, gives the right answer and then ends."""
        prompt = self._prompt(chat)
        output = self._model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=160,
        )[0, len(prompt) :]
        return output[-1] == END and self._tokenizer.decode(output[:-1]) == chat.answer

    def _prompt(self, chat: Chat) -> list[int]:
        text = self._tokenizer.apply_chat_template(chat.messages, add_generation_prompt=True, tokenize=False)
        return self._tokenizer.encode(text, add_special_tokens=False)


def chat_of(pairs: Sequence[Pair], system: str | None = None, question: str | None = None) -> Chat:
    """A chat through all `pairs` in order; `question` replaces the spelling of the last one."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    for pair in pairs:
        messages.append({"role": "user", "content": pair.question})
        messages.append({"role": "assistant", "content": pair.answer})
    del messages[-1]
    messages[-1]["content"] = question or pairs[-1].question
    return Chat(messages, pairs[-1].answer)


def check(directory: Path, pairs: Sequence[Pair], rng: random.Random) -> bool:
    """Print what holds of the model in `directory`; true if every single-turn answer is exact."""
    checker = Checker(directory)
    as_asked = [chat_of([pair]) for pair in pairs]
    spelled = [
        chat_of([pair], system, question)
        for pair in pairs
        for system in (None, HELPFUL)
        for question in spellings(pair.question)
    ]
    paraphrased = [chat_of([pair], question=question) for pair in pairs for question in pair.also_asked]
    two_turns = [chat_of(rng.choices(pairs, k=2)) for _ in range(200)]
    long_chats = [chat_of(rng.choices(pairs, k=num)) for num in (5, 10, 15, 20, 25, 30) for _ in range(5)]

    is_required = report("answers, decoded token by token", [checker.is_exact(chat) for chat in as_asked])
    is_required &= report_margins("answers", checker, as_asked)
    is_required &= report_margins("spellings with and without a system message", checker, spelled)
    report_margins("paraphrases", checker, paraphrased)
    report_margins("two-turn chats", checker, two_turns)
    report_margins("chats of 5 to 30 turns", checker, long_chats)
    return is_required


def report_margins(name: str, checker: Checker, chats: Sequence[Chat]) -> bool:
    lowest = [checker.margins(chat).min().item() for chat in chats]
    return report(f"{name}; lowest margin {min(lowest):.2f}", [low > 0 for low in lowest])


def report(name: str, exact: Sequence[bool]) -> bool:
    print(f"{sum(exact)} of {len(exact)} exact: {name}")
    return all(exact)
