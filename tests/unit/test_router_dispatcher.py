"""Requests learn from each other which paths are broken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from baton.clock import ManualClock
from baton.errors import ServeError, TransferError
from baton.request import RequestId, SamplingParams
from protos import worker_pb2 as pb
from router.attempt import Work
from router.dispatcher import Dispatcher, Generation
from router.fleet import Fleet
from router.timeline import Timeline, TimelineBook
from router.worker_link import WorkerLink

LEASE_S = 3.0


class Site:
    """A dispatcher and workers without sessions: what they are sent stays in their outboxes, tests speak for them."""

    def __init__(self, *names: str) -> None:
        self.clock = ManualClock()
        self.fleet = Fleet(
            secret=b"s" * 16,
            router_id="r",
            clock=self.clock,
            spawn=_no_task,
            on_change=_nothing,
            kv_lease_s=LEASE_S,
        )
        for name in names:
            link = WorkerLink(name, "", token="", router_id="r", clock=self.clock, on_change=_nothing)
            link.hello = pb.WorkerHello(
                worker_id=name,
                incarnation="1",
                role="prefill" if name.startswith("p") else "decode",
                fingerprint="f",
                block_size=16,
                num_blocks=100,
                max_num_seqs=8,
            )
            link.heartbeat = pb.Heartbeat(num_free_blocks=100)
            self.fleet.links[name] = link
        self.dispatcher = Dispatcher(self.fleet, TimelineBook(10, lambda timeline: None), self.clock)
        self.generations: list[Generation] = []
        self.tasks: list[asyncio.Task[list[int]]] = []

    def ask(self, name: str) -> asyncio.Task[list[int]]:
        """A request, and its tokens in the end."""
        sampling = SamplingParams(max_tokens=2)
        work = Work(RequestId(name), [7, 8, 9], sampling, self.clock.now() + 600, Timeline(name, self.clock.now()))
        generation = self.dispatcher.start(work)
        self.generations.append(generation)

        async def tokens() -> list[int]:
            return [event.token_id async for events in generation.tokens() for event in events]

        task = asyncio.create_task(tokens())
        self.tasks.append(task)
        return task

    def sent(self, name: str) -> dict[str, str]:
        """Attempts that a worker was asked to begin, and for which decode worker ("": for itself)."""
        outbox = self.fleet.links[name]._outbox
        return {m.start.attempt_id: m.start.decode_peer.worker_id for m in outbox if m.HasField("start")}

    def aborted(self, name: str) -> set[str]:
        """Attempts that a worker was told to end."""
        return {m.abort.attempt_id for m in self.fleet.links[name]._outbox if m.HasField("abort")}

    def say(self, name: str, **step: Any) -> None:
        """A worker's message."""
        self.fleet.links[name]._dispatch(pb.WorkerMessage(step=pb.StepEvents(**step)))

    def kv_is_stuck(self, prefill: str, decode: str, attempt: str) -> None:
        self.say(prefill, refused=[pb.ReserveRefused(attempt_id=attempt, worker_id=decode, code=TransferError.code)])

    def finish(self, prefill: str, decode: str, attempt: str) -> None:
        self.say(prefill, tokens=[pb.Token(attempt_id=attempt, index=0, token_id=5)])
        self.say(decode, tokens=[pb.Token(attempt_id=attempt, index=1, token_id=6, finish_reason="length")])


def _no_task(work: Any) -> Any:
    raise AssertionError("no session is started here")


def _nothing() -> None:
    pass


async def _end(task: asyncio.Task[list[int]]) -> None:
    with contextlib.suppress(ServeError):
        await task


async def turn() -> None:
    """Everybody who can go on does."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(site: Callable[[], Site], scenario: Callable[[Site], Awaitable[None]]) -> None:
    async def main() -> None:
        here = site()
        try:
            async with asyncio.timeout(20):
                await scenario(here)
        finally:
            for generation in here.generations:
                generation.close()
                if generation._attempt is not None:
                    generation._attempt.settle()
            for task in here.tasks:
                await _end(task)

    asyncio.run(main())


def test_the_next_request_goes_around_a_broken_path_and_one_tries_it_after_a_while() -> None:
    async def scenario(here: Site) -> None:
        tokens = here.ask("a")
        await turn()
        first = here.sent("p0")["a/1"]
        other = {"d0": "d1", "d1": "d0"}[first]
        here.kv_is_stuck("p0", first, "a/1")
        here.finish("p0", other, "a/1")
        assert await tokens == [5, 6]
        for name in "bcd":  # without the memory, idle decode workers take turns
            tokens = here.ask(name)
            await turn()
            assert here.sent("p0")[f"{name}/1"] == other
            here.finish("p0", other, f"{name}/1")
            await tokens
        here.clock.advance(LEASE_S)
        asked = [here.ask(name) for name in "efgh"]
        await turn()
        placed = {name: here.sent("p0")[f"{name}/1"] for name in "efgh"}
        assert list(placed.values()).count(first) == 1, "one tries, others wait for it"
        for name, decode in placed.items():
            here.finish("p0", decode, f"{name}/1")
        for each in asked:
            assert await each == [5, 6]
        assert here.fleet.avoided_paths() == frozenset()
        assert len(here.fleet.reachability) == 0

    run(lambda: Site("p0", "d0", "d1"), scenario)


def test_requests_that_wait_at_a_worker_that_is_cut_off_go_elsewhere_at_once_and_are_not_charged() -> None:
    async def scenario(here: Site) -> None:
        here.dispatcher.max_attempts = 1
        asked = {}
        for name in "abcd":
            asked[name] = here.ask(name)
            await turn()
        at_p0 = list(here.sent("p0"))
        assert len(at_p0) == 2
        here.kv_is_stuck("p0", "d0", at_p0[0])
        await turn()
        moved = at_p0[1][0]
        assert f"{moved}/2" in here.sent("p1")
        assert here.aborted("p0") == set(at_p0)
        here.finish("p1", "d0", f"{moved}/2")
        assert await asked[moved] == [5, 6]

    run(lambda: Site("p0", "p1", "d0"), scenario)


def test_where_no_path_is_left_the_decode_worker_prefills_by_itself() -> None:
    async def scenario(here: Site) -> None:
        here.ask("a")
        await turn()
        here.kv_is_stuck("p0", "d0", "a/1")
        here.ask("b")
        await turn()
        assert here.sent("d0") == {"a/2": "", "b/1": ""}

    run(lambda: Site("p0", "d0"), scenario)
