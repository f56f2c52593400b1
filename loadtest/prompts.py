"""From plain requests to prompts: token ids or words, the same for the same load and content id on every client."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from loadtest.workload import LoadRequest

if TYPE_CHECKING:
    from loadtest.target import Target

_CACHED_TOKENS: Final = 4_000_000  # of shared pieces; less than 100 MB

_TEXT: Final = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education foot boy age policy music mind wall field ground green "
    "light river stone summer winter window paper letter table north south market garden bridge engine signal"
)
WORDS: Final = tuple(_TEXT.split())


class PromptMaker:
    """Makes the contents of prompts. Not thread-safe.

    A piece's content is a sequence of choices drawn from (run id, content id); a shorter piece is a longer one's
    beginning. Every load has a run id of its own, so that no load finds another one's prompts in a prefix cache.
    With token ids a prompt has exactly its number of tokens; in words it has about as many.
    """

    def __init__(self, target: Target, run_id: str) -> None:
        """`target` says of what prompts are made."""
        self._seed = int.from_bytes(hashlib.blake2b(run_id.encode(), digest_size=8).digest())
        self._ids = [str(token) for token in target.alphabet]
        self._tokens_per_word = target.tokens_per_word
        self._overhead = target.overhead_tokens
        self._shared: OrderedDict[int, npt.NDArray[np.int64]] = OrderedDict()
        self._num_shared_tokens = 0

    def ids(self, request: LoadRequest) -> str:
        """The prompt as a JSON list of token ids."""
        return "[" + ",".join([self._ids[choice] for choice in self._choices(request, len(self._ids))]) + "]"

    def text(self, request: LoadRequest) -> str:
        """The prompt in words, or the text that it is."""
        if request.text:
            return request.text
        words: list[str] = []
        num_tokens = 0
        for place, (content, count) in enumerate(request.pieces):
            num_tokens += count
            is_last = place == len(request.pieces) - 1
            wanted = (num_tokens - (self._overhead if is_last else 0)) / self._tokens_per_word
            missing = max(0 if words else 1, round(wanted) - len(words))
            words += [WORDS[choice] for choice in self._piece(content, missing, len(WORDS))]
        return " ".join(words)

    def _choices(self, request: LoadRequest, size: int) -> npt.NDArray[np.int64]:
        parts = [self._piece(content, count, size) for content, count in request.pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _piece(self, content: int, count: int, size: int) -> npt.NDArray[np.int64]:
        known = self._shared.get(content)
        if known is not None and len(known) >= count:
            self._shared.move_to_end(content)
            return known[:count]
        rng = np.random.default_rng([self._seed, content & 0xFFFF_FFFF_FFFF_FFFF])
        drawn = rng.integers(0, size, count)
        if content >= 0:  # may be asked for again
            self._num_shared_tokens += count - (0 if known is None else len(known))
            self._shared[content] = drawn
            while self._num_shared_tokens > _CACHED_TOKENS:
                self._num_shared_tokens -= len(self._shared.popitem(last=False)[1])
        return drawn
