"""Workers on pools that hold one request: the product's leader, engine and endpoint around tell-tale KV, without a front.

The test plays the router. A worker lives in this process or in a child that stops or kills itself at a chosen moment.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from baton.clock import SystemClock
from baton.kv_layout import KVGeometry, KVLayout
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, RequestId, SamplingParams, attempt_id
from engine.engine import LocalEngine
from engine.sim import SimRunner
from engine.types import EngineConfig
from kvtransfer.api import EndpointConfig, EndpointStats, PeerWorker, TransferId
from kvtransfer.endpoint import Endpoint
from kvtransfer.messages import Data
from tests.simulation import oracle
from worker import codec
from worker.channel import pack, unpack
from worker.group import Group, GroupRunner
from worker.hook import TransferHook
from worker.leader import Leader
from worker.role import RolePolicy

ROUTER: Final = "router-1"
BLOCK_SIZE: Final = 16
NUM_BLOCKS: Final = 5
PROMPT_TOKENS: Final = 60
MAX_TOKENS: Final = 8
NUM_LAYERS: Final = 3
NUM_CHUNKS: Final = NUM_LAYERS * 4
"""Data frames of one prompt: the window lets each carry 16 tokens of one layer."""

_numbers = itertools.count()


class Wish:
    """One request that nobody has made before: no cache knows its prompt."""

    def __init__(self) -> None:
        number = next(_numbers)
        self.prompt: Final = tuple((number * 97 + 31 * i * i + i) % oracle.VOCAB_SIZE for i in range(PROMPT_TOKENS))
        self.attempt: Final = attempt_id(RequestId(f"r{number}"), 1)
        sampling = SamplingParams(temperature=0.0, seed=0, max_tokens=MAX_TOKENS)
        self.request: Final = GenerateRequest(self.attempt, self.prompt, PROMPT_TOKENS, sampling, "a", "")

    @property
    def expected(self) -> list[int]:
        """The tokens of an undisturbed engine."""
        model = oracle.model(NUM_LAYERS, 2)
        return list(oracle.undisturbed(model, self.prompt, "a", "", 0.0, 0)[:MAX_TOKENS])


class Trap:
    """Sends this process a signal at a moment of a hand-over, once. Implements kvtransfer.faults.FaultHook.

    Moments: "chunk 0".."chunk 12" (so many data frames are sent), "manifest" (it is sent, too), "landing 0".."landing 20"
    (so many pieces are taken in, one more is in place and not verified), each state of ReceiveState as it is entered.
    """

    def __init__(self) -> None:
        self._moment = ""
        self._signal = signal.SIGKILL
        self._num_sent = 0
        self._num_landed = 0

    def arm(self, moment: str, number: int) -> None:
        """Count from here on."""
        self._moment, self._signal = moment, signal.Signals(number)
        self._num_sent = self._num_landed = 0

    def watch(self, endpoint: Endpoint) -> None:
        """Of this endpoint."""
        receive, finish = endpoint._thread.receive, endpoint.finish
        reserve, move = receive._reserve, receive._move

        def reserved(*args: Any) -> None:
            reserve(*args)
            self._reach("requested")

        def moved(transfer: Any, state: Any) -> None:
            move(transfer, state)
            self._reach(str(state))

        def finished(transfer_id: TransferId, manifest: bytes) -> None:
            is_late = self._moment in (f"chunk {NUM_CHUNKS}", "manifest")
            while is_late and self._num_sent < NUM_CHUNKS:
                turn(endpoint)
            turn(endpoint)  # what was counted has been sent
            self._reach(f"chunk {NUM_CHUNKS}")
            finish(transfer_id, manifest)
            if is_late:
                turn(endpoint)
            self._reach("manifest")

        receive._reserve, receive._move = reserved, moved  # type: ignore[method-assign]
        endpoint.finish = finished  # type: ignore[method-assign]

    def before_send(self, frame: Data, payload: list[memoryview]) -> list[memoryview]:
        """See FaultHook."""
        self._reach(f"chunk {self._num_sent}")
        self._num_sent += 1
        return payload

    def after_landing(self, frame: Data, piece: memoryview) -> None:
        """See FaultHook. A frame is one piece, but for the last unit's, which is not full: four."""
        self._reach(f"landing {self._num_landed}")
        self._num_landed += 1

    def _reach(self, moment: str) -> None:
        if moment == self._moment:
            self._moment = ""
            signal.pthread_kill(threading.get_ident(), self._signal)  # this thread does nothing more, the others soon


def turn(endpoint: Endpoint) -> None:
    """Wait until the transfer thread has run what was posted so far, and sent what follows from it."""
    for _ in range(2):
        turned = threading.Event()
        endpoint._thread.post(turned.set)
        turned.wait(1.0)


class _Front:
    """The leader's channel to its front."""

    socket = None

    def __init__(self) -> None:
        self.to_leader: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self.items: list[list[Any]] = []
        """What the leader said to the router."""

    def send(self, message: Any) -> None:
        match unpack(pack(message)):
            case ["events", by_router]:
                self.items += by_router.get(ROUTER, [])

    def drain(self) -> list[Any]:
        messages = []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(self.to_leader.get_nowait())
        return messages


class TinyWorker:
    """A leader and all it needs. Whoever holds it takes its turns."""

    def __init__(self, name: str, transport: str, unix_dir: str, faults: Trap | None = None) -> None:
        model = oracle.model(NUM_LAYERS, 2)
        self.layout: Final = KVLayout(model, KVGeometry(1, BLOCK_SIZE, NUM_BLOCKS), 0)
        self.name, self.incarnation = name, secrets.token_hex(8)
        self.runner: Final = SimRunner(self.layout, oracle.VOCAB_SIZE, verify_all=True)
        config = EndpointConfig(
            name,
            self.incarnation,
            self.layout,
            oracle.SECRET,
            unix_dir=unix_dir,
            transports={"tcp": ("tcp",), "shm": ("shm", "tcp")}[transport],
            credit_bytes=1,
        )
        self.endpoint: Final = Endpoint(config, self.runner.kv_buffer(), self.runner.kv_fd(), faults=faults)
        self.endpoint._thread.wake_bytes = 0  # so that there are many chunks, for all that layers are small
        self.front: Final = _Front()
        hook = TransferHook(self.endpoint)
        group = Group(None, "", 1, self.endpoint, hook)  # type: ignore[arg-type]
        runner = GroupRunner(self.runner, group)
        engine_config = EngineConfig(
            BLOCK_SIZE,
            NUM_BLOCKS,
            max_model_len=NUM_BLOCKS * BLOCK_SIZE,
            max_num_batched_tokens=BLOCK_SIZE,
            vocab_size=oracle.VOCAB_SIZE,
        )
        clock = SystemClock()
        self.engine: Final = LocalEngine(engine_config, runner, PrefixHasher(b"prefix", model.fingerprint), clock)
        self._leader = Leader(
            self.engine,
            self.endpoint,
            group,
            hook,
            self.front,  # type: ignore[arg-type]
            RolePolicy("mixed", accepts_transfers=True),
            clock,
            tp_size=1,
        )
        runner.before_step = self._leader.before_step
        hook.on_layer = self._leader.on_layer
        self.command("router_here", ROUTER)

    @property
    def peer(self) -> list[Any]:
        """As a router names it to others."""
        return codec.pack_peer(PeerWorker(self.name, self.incarnation, (self.endpoint.address,)))

    @property
    def stats(self) -> EndpointStats:
        """Of its endpoint."""
        return self.endpoint.stats()

    def command(self, *message: Any) -> None:
        """The front says."""
        self.front.to_leader.put(unpack(pack(message)))

    def turn(self) -> None:
        """Everything that waits, then one step."""
        self._leader.turn()

    @property
    def num_stale(self) -> int:
        """Late frames and messages that were refused, as its metrics count them."""
        counters: dict[str, int] = self._leader.status()["counters"]
        return counters["kv_stale_frames_dropped"]

    @property
    def is_whole(self) -> bool:
        """Is every block free or cached, and nothing open?"""
        found, stats = self.engine.stats(), self.stats
        resting = found.blocks_by_state["free"] + found.blocks_by_state["cached"]
        is_idle = not any(found.seqs_by_state.values()) and not len(self._leader._sending)
        return resting == NUM_BLOCKS and is_idle and not (stats.open_sends or stats.open_receives)

    def tokens(self, attempt: AttemptId) -> list[int]:
        """What it has told the router, in order."""
        packed = [item[1] for item in self.front.items if item[0] == "token"]
        return [event.token_id for event in map(codec.unpack_token, packed) if event.attempt_id == attempt]

    def has_said(self, kind: str, attempt: AttemptId) -> bool:
        """`refused` or `failed`?"""
        return any(item[:2] == [kind, attempt] for item in self.front.items)

    def foreign_bytes(self, wish: Wish, table: Sequence[int], num_tokens: int, before: bytes) -> int:
        """Bytes of the pool that are neither the wish's own, where it has blocks, nor as they were `before`."""
        view = oracle.PoolView(self.layout, self.runner.kv_buffer())
        pool = np.frombuffer(self.runner.kv_buffer(), np.uint8)
        states = oracle.states(self.layout.model, "a", "", (*wish.prompt, *wish.expected))
        is_ours = np.zeros(len(pool), bool)
        ours = oracle.PoolView(self.layout, memoryview(is_ours.view(np.uint8)))
        num_wrong = 0
        for layer in range(NUM_LAYERS):
            for position in range(num_tokens):
                block, offset = table[position // BLOCK_SIZE], position % BLOCK_SIZE
                ours.layers[layer][block, :, :, offset] = 0x0101010101010101
                one = range(position, position + 1)
                num_wrong += not view.is_right(layer, table, one, states, slice(None))
        changed = (pool != np.frombuffer(before, np.uint8)) & ~is_ours
        view.release()
        ours.release()
        return num_wrong + int(changed.sum())

    def close(self) -> None:
        """End it."""
        self.endpoint.close()
        self.runner.close()


class Child:
    """A TinyWorker in a process of its own, as its parent sees it."""

    def __init__(self, name: str, transport: str, unix_dir: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.hand_over", name, transport, unix_dir],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd()},
        )
        self._peer: list[Any] | None = None

    @property
    def peer(self) -> list[Any]:
        """As a router names it to others; waits until it has started."""
        if self._peer is None:
            self._peer = self._hear()
        return self._peer

    def arm(self, moment: str, number: signal.Signals) -> None:
        """See Trap; then it is in place."""
        self._ask("arm", moment, int(number))

    def command(self, *message: Any) -> None:
        """The front says."""
        self._tell("front", *message)

    def look(self) -> dict[str, Any]:
        """Its state: `is_whole`, `items`, `num_stale`, `integrity_failures`."""
        state: dict[str, Any] = self._ask("look")
        return state

    def tokens(self, attempt: AttemptId) -> list[int]:
        """What it has told the router, in order."""
        return [item[1][2] for item in self.look()["items"] if item[0] == "token" and item[1][0] == attempt]

    def is_down(self) -> bool:
        """Stopped or dead?"""
        # In one question: it may die between two. WNOWAIT leaves its exit status to Popen.
        found = os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return found is not None

    def resume(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _tell(self, *message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(pack(message).hex() + "\n")
        self._process.stdin.flush()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        return unpack(bytes.fromhex(self._process.stdout.readline()))

    def _ask(self, *message: Any) -> Any:
        self.peer  # noqa: B018  # its first line
        self._tell(*message)
        return self._hear()


def main() -> None:
    """The child: obeys one line at a time and takes turns meanwhile."""
    trap = Trap()
    worker = TinyWorker(*sys.argv[1:4], faults=trap)
    trap.watch(worker.endpoint)
    news = threading.Event()
    worker.endpoint.set_wakeup(news.set)
    lines: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(unpack(bytes.fromhex(line)))
            news.set()
        lines.put(None)
        news.set()

    threading.Thread(target=read, daemon=True).start()
    _answer(worker.peer)
    obey: dict[str, Callable[..., Any]] = {
        "arm": lambda moment, number: _answer(trap.arm(moment, number)),
        "front": worker.command,
        "look": lambda: _answer(
            {
                "is_whole": worker.is_whole,
                "items": worker.front.items,
                "num_stale": worker.stats.stale_frames_dropped,
                "integrity_failures": worker.stats.integrity_failures,
            }
        ),
    }
    while True:
        news.wait(0.0 if worker.engine.has_work() else 0.1)
        news.clear()
        while not lines.empty():
            line = lines.get()
            if line is None:
                worker.close()
                return
            obey[line[0]](*line[1:])
        worker.turn()


def _answer(value: Any) -> None:
    sys.stdout.write(pack(value).hex() + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
