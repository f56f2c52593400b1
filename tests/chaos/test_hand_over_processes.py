"""One side of a hand-over is killed or stopped at every moment, on pools that hold one request and are reused at once.

The other side runs here, in real time, and the test plays the router. Real time from the fault to a whole pool is
bounded by WHOLE_S; a stopped process is noticed by the router, which this takes SILENCE_S of it.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from router.worker_link import SILENCE_S
from tests.support.hand_over import NUM_CHUNKS, PROMPT_TOKENS, ROUTER, Child, TinyWorker, Wish
from tests.support.transfer import kvtransfer_threads, open_fds
from worker import codec

WHOLE_S: Final = 3.0
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
CHUNKS: Final = [f"chunk {number}" for number in range(NUM_CHUNKS + 1)]
RECEIVER_MOMENTS: Final = [
    "requested",
    "receiving",
    "landing 0",
    "landing 6",
    "landing 20",
    "received",
    "stopping",
    "closed",
    "stopping by abort",
    "closed by abort",
]


class Stage:
    """Workers of this process, and children."""

    def __init__(self, transport: str, unix_dir: str) -> None:
        self._transport, self._unix_dir = transport, unix_dir
        self._news = threading.Event()
        self.prefill, self.decode, self.other = self._worker("p"), self._worker("d"), self._worker("o")
        self._children: list[Child] = []
        self._spare = self._start()
        self._lasting: Child | None = None

    def child(self, fault: signal.Signals) -> Child:
        """One that may be killed; the next one starts meanwhile. Who is only stopped is used again."""
        if fault is STOP and self._lasting is not None:
            return self._lasting
        child, self._spare = self._spare, self._start()
        if fault is STOP:
            self._lasting = child
        return child

    def until(self, condition: Callable[[], bool], *workers: TinyWorker, within_s: float = 20.0) -> None:
        """Take turns until something holds."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, [(w.name, w.front.items, w.engine.stats(), w.stats) for w in workers]
            self._news.clear()
            for worker in workers:
                worker.turn()
            self._news.wait(0.003)  # children wake nobody here

    def hand_over(self, wish: Wish, source: TinyWorker, destination: TinyWorker | Child) -> None:
        """From the first turn to the last token, undisturbed."""
        start(source, wish, destination)
        local = [worker for worker in (source, destination) if isinstance(worker, TinyWorker)]
        self.until(lambda: len(destination.tokens(wish.attempt)) == len(wish.expected) - 1, *local)
        assert source.tokens(wish.attempt) + destination.tokens(wish.attempt) == wish.expected
        self.until(lambda: all(worker.is_whole for worker in local), *local)

    def close(self) -> None:
        """End all of them."""
        for child in self._children:
            child.close()
        for worker in (self.prefill, self.decode, self.other):
            worker.close()

    def _worker(self, name: str) -> TinyWorker:
        worker = TinyWorker(name, self._transport, self._unix_dir)
        worker.endpoint.set_wakeup(self._news.set)
        return worker

    def _start(self) -> Child:
        child = Child(f"c{len(self._children)}", self._transport, self._unix_dir)
        self._children.append(child)
        return child


@pytest.fixture(scope="module", params=["tcp", "shm"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    """After all: no thread and no descriptor is left here."""
    assert Wish().expected  # the oracle keeps its engine
    fds = open_fds()
    with tempfile.TemporaryDirectory() as unix_dir:
        made = Stage(request.param, unix_dir)
        try:
            yield made
        finally:
            made.close()
    assert kvtransfer_threads() == []
    assert open_fds() <= fds


def start(source: TinyWorker | Child, wish: Wish, destination: TinyWorker | Child) -> None:
    """The router's first message."""
    source.command("start", ROUTER, codec.pack_request(wish.request), destination.peer)


def rest_of(began: float, fault: signal.Signals) -> float:
    """What is left of the time in which the pool must be whole."""
    return WHOLE_S - (SILENCE_S if fault is STOP else 0.0) - (time.monotonic() - began)


def resting(child: Child) -> Callable[[], bool]:
    return lambda: bool(child.look()["is_whole"])


@pytest.mark.parametrize("moment", [*CHUNKS, "manifest"])
@pytest.mark.parametrize("fault", [KILL, STOP])
def test_x11_p2_p3_p4_a_sender_that_dies_or_hangs_after_any_chunk_leaves_no_block_and_no_byte(
    stage: Stage, fault: signal.Signals, moment: str
) -> None:
    sender, here = stage.child(fault), stage.decode
    lost, heir = Wish(), Wish()
    sender.arm(moment, fault)
    start(sender, lost, here)
    stage.until(sender.is_down, here)
    began = time.monotonic()
    if moment == "manifest":  # it is needed no more
        stage.until(lambda: here.tokens(lost.attempt) == lost.expected[1:], here)
    elif fault is STOP:
        here.command("abort", lost.attempt)
    stage.until(lambda: here.is_whole, here, within_s=rest_of(began, fault))
    assert here.has_said("failed", lost.attempt) == (fault is KILL and moment != "manifest")

    before, verified, late = bytes(here.runner.kv_buffer()), here.stats.frames_verified, here.num_stale
    start(stage.other, heir, here)
    stage.other.turn()
    stage.until(lambda: here.stats.frames_verified >= verified + 3, here)
    table = here.engine.block_table(heir.attempt)
    assert len(table) == 5, "it has every block"
    if fault is STOP:
        sender.command("abort", lost.attempt)
        sender.resume()
        if moment in CHUNKS[:-1]:  # the manifest alone may be overtaken by what it hears first
            stage.until(lambda: here.num_stale > late, here)
    stage.until(lambda: here.tokens(heir.attempt) == heir.expected[1:], here, stage.other)
    assert here.foreign_bytes(heir, table, PROMPT_TOKENS + len(heir.expected) - 1, before) == 0
    assert here.stats.integrity_failures == 0
    if moment != "manifest":
        assert here.tokens(lost.attempt) == []
    if fault is STOP:
        stage.until(resting(sender), here, within_s=WHOLE_S)
    stage.until(lambda: here.is_whole and stage.other.is_whole, here, stage.other)


@pytest.mark.parametrize("moment", RECEIVER_MOMENTS)
def test_d1_a_receiver_that_dies_in_any_state_costs_nothing_but_another_hand_over(stage: Stage, moment: str) -> None:
    receiver, here, wish = stage.child(KILL), stage.prefill, Wish()
    began = _break_receiver(stage, receiver, KILL, moment, wish)

    def is_refused() -> bool:
        return here.has_said("refused", wish.attempt)

    may_be_done = moment in ("stopping", "closed")  # its last word may have been heard, or may have died with it
    stage.until(lambda: is_refused() or (may_be_done and here.is_whole), here, within_s=rest_of(began, KILL))
    if not is_refused():
        assert here.tokens(wish.attempt) == wish.expected[:1]
        stage.hand_over(Wish(), here, stage.decode)
        return
    here.command("redirect", wish.attempt, stage.decode.peer)  # its KV was pinned, and goes to another one
    stage.until(lambda: here.is_whole, here, stage.decode, within_s=rest_of(began, KILL))
    stage.until(lambda: stage.decode.is_whole, stage.decode)
    assert here.tokens(wish.attempt) + stage.decode.tokens(wish.attempt) == wish.expected


@pytest.mark.parametrize("moment", RECEIVER_MOMENTS)
def test_d5_x11_a_receiver_that_hangs_in_any_state_and_goes_on_reads_no_blocks_that_others_have(
    stage: Stage, moment: str
) -> None:
    receiver, here = stage.child(STOP), stage.prefill
    lost, heir = Wish(), Wish()
    began = _break_receiver(stage, receiver, STOP, moment, lost)
    here.command("abort", lost.attempt)
    stage.until(lambda: here.is_whole, here, within_s=rest_of(began, STOP))

    before, late = bytes(here.runner.kv_buffer()), here.num_stale
    start(here, heir, stage.decode)
    stage.until(lambda: len(here.tokens(heir.attempt)) == 1, here)  # its KV lies where the lost one's lay
    table = here.engine.block_table(heir.attempt)
    receiver.command("abort", lost.attempt)
    receiver.resume()
    if moment not in ("requested", "received"):  # it has nothing to say there
        stage.until(lambda: here.num_stale > late, here)
    stage.until(resting(receiver), here, within_s=WHOLE_S)
    assert here.foreign_bytes(heir, table, PROMPT_TOKENS, before) == 0
    stage.until(lambda: len(stage.decode.tokens(heir.attempt)) == len(heir.expected) - 1, here, stage.decode)
    assert here.tokens(heir.attempt) + stage.decode.tokens(heir.attempt) == heir.expected
    stage.until(lambda: here.is_whole and stage.decode.is_whole, here, stage.decode)
    stage.hand_over(Wish(), here, receiver)
    assert set(receiver.tokens(lost.attempt)) <= set(lost.expected[1:])


def _break_receiver(stage: Stage, receiver: Child, fault: signal.Signals, moment: str, wish: Wish) -> float:
    """Answers when it happened."""
    here = stage.prefill
    receiver.arm(moment.removesuffix(" by abort"), fault)
    start(here, wish, receiver)
    if moment.endswith("by abort"):
        sent = here.stats.bytes_sent
        here.turn()
        stage.until(lambda: here.stats.bytes_sent > sent)
        receiver.command("abort", wish.attempt)
        stage.until(receiver.is_down)
    else:
        stage.until(receiver.is_down, here)
    return time.monotonic()


def test_the_moments_are_all_there_are(stage: Stage) -> None:
    sender: Any = stage.child(STOP)
    frames, wish = stage.decode.stats.frames_verified, Wish()
    start(sender, wish, stage.decode)
    stage.until(lambda: stage.decode.tokens(wish.attempt) == wish.expected[1:], stage.decode)
    assert stage.decode.stats.frames_verified - frames == NUM_CHUNKS
    stage.until(resting(sender), stage.decode)
