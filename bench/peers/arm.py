"""What every arm of the engine bench is: a process that answers commands, one JSON object a line, until its stdin ends.

Only the standard library: this runs under the Python of each peer. The clock is here, so it is the same for all arms.
Answers leave by what was standard output at the start; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Tokens = list[int]


class Arm(Protocol):
    """An engine with a model. One thread calls it, one call at a time; everything is greedy and ignores EOS."""

    def prepare(self, num_seqs: int, num_tokens: int) -> None:
        """Make room for so many sequences of so many tokens, where room is made per use. Not timed."""

    def generate(self, prompts: Sequence[Tokens], num_tokens: int) -> list[Tokens]:
        """All prompts at once; exactly `num_tokens` of each. Nothing is reused from earlier calls."""
        ...

    def begin(self, prompts: Sequence[Tokens]) -> None:
        """Prefill a batch and keep it: each sequence has at least one token afterwards."""

    def decode(self, num_steps: int) -> None:
        """`num_steps` more tokens for each sequence of the batch."""

    def end(self) -> None:
        """Drop the batch."""

    def remember(self, prompt: Tokens) -> None:
        """Run a prompt so that its KV stays for `generate_again`. Not timed."""

    def generate_again(self, prompt: Tokens) -> None:
        """The first token of a prompt that was just remembered."""

    def facts(self) -> dict[str, Any]:
        """Versions and settings that a reader of the numbers wants to know."""
        ...


def prompts(count: int, num_tokens: int, seed: int, vocab_size: int) -> list[Tokens]:
    """The same on every arm. Ids near either end of the vocabulary are left out: they may be special."""
    rng = random.Random(seed)
    return [[rng.randrange(16, vocab_size - 16) for _ in range(num_tokens)] for _ in range(count)]


def serve(start: Callable[[dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Start from the options in argv[1]; then answer one line after the other, first a hello, until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    answer = start(json.loads(sys.argv[1]))
    _say(replies, answer({"op": "hello"}))
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:400]}
        _say(replies, reply)
    sys.stderr.flush()
    os._exit(0)  # a peer's threads and children must not hold up the bench


def serve_arm(make: Callable[[dict[str, Any]], Arm]) -> None:
    """Be the arm that `make` makes."""
    serve(lambda options: Session(make, options).answer)


def _say(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


class Session:
    """One arm and its clock."""

    def __init__(self, make: Callable[[dict[str, Any]], Arm], options: dict[str, Any]) -> None:
        """Load the model and generate a first token, which ends the start-up."""
        began = time.perf_counter()
        self._arm = make(options)
        self._load_s = time.perf_counter() - began
        self._vocab_size = int(options["vocab_size"])
        self._arm.prepare(1, 32)
        self._arm.generate(prompts(1, 16, 0, self._vocab_size), 1)

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """`seconds` is the time of what the command measures.

        Raises:
            RuntimeError: the arm did not do what it was asked to.
        """
        arm, operation = self._arm, command["op"]
        if operation == "hello":
            return {"load_s": self._load_s, **arm.facts()}
        if operation == "decode":
            return {"seconds": _timed(lambda: arm.decode(command["num_steps"]))}
        if operation == "end":
            arm.end()
            return {}
        made = prompts(command["num_seqs"], command["num_tokens"], command["seed"], self._vocab_size)
        num_output = command.get("num_output", 1)
        arm.prepare(len(made), command["num_tokens"] + num_output)
        if operation == "begin":
            arm.begin(made)
            arm.decode(command["num_warm"])
            return {}
        if operation == "again":
            arm.remember(made[0])
            return {"seconds": _timed(lambda: arm.generate_again(made[0]))}
        assert operation == "generate", operation
        found: list[list[Tokens]] = []
        seconds = _timed(lambda: found.append(arm.generate(made, num_output)))
        lengths = [len(tokens) for tokens in found[0]]
        if lengths != [num_output] * len(made):
            raise RuntimeError(f"asked for {num_output} tokens each, got {lengths}")
        return {"seconds": seconds, **({"tokens": found[0]} if command.get("wants_tokens") else {})}


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
