"""A worker of the simulation: the product's leader, followers, engine and endpoints around virtual sockets and time."""

from __future__ import annotations

import itertools
import random
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from baton.kv_layout import UNIT_TOKENS, KVGeometry, KVLayout, ModelKV
from baton.prefix_hash import PrefixHasher
from engine.engine import LocalEngine
from engine.sim import CostModel, SimRunner, TellTaleMismatch
from engine.telltale import Words
from engine.types import BatchEntry, EngineConfig, SeqState
from kvtransfer.api import CorruptPool, EndpointConfig, PeerRank, PeerWorker, SendRequest, TransferId
from kvtransfer.arrival import Arrival
from kvtransfer.auth import Session
from kvtransfer.connection import Connection
from kvtransfer.lanes import Landing
from kvtransfer.messages import Data
from tests.simulation import corruption, history, oracle
from tests.simulation.corruption import InjectionBook, LandingFaults, name_of, spoil_bytes
from tests.simulation.network import Network, SimSocket
from tests.simulation.oracle import PoolView
from tests.simulation.transfer import SimEndpoint, address_of
from tests.simulation.virtual_time import Actor, Process, Scheduler
from tests.support.audit import audit_ledger
from worker import codec
from worker.channel import pack, unpack
from worker.follower import Follower
from worker.group import Group, GroupRunner
from worker.hook import TransferHook
from worker.leader import Leader
from worker.role import RolePolicy

_THREAD_DELAY_S: Final = (0.00001, 0.0004)
_TICK_S: Final = 0.2
_MAX_DEPTH: Final = 2
"""How many processes may compute at the same time; the steps of others take none."""
_AUDIT_EVERY: Final = 6
_PLAN: Final = pack(["plan", None])[:6]
_WRITABLE: Final = (SeqState.RECEIVING, SeqState.QUARANTINED)


class Killed(BaseException):
    """The process that was computing is dead: unwind its stack."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What distinguishes one worker from another."""

    name: str
    role: str
    tp_size: int
    block_size: int
    num_blocks: int
    max_num_batched_tokens: int
    transports: tuple[str, ...]
    credit_bytes: int


@dataclass(frozen=True, slots=True)
class Known:
    """A transfer as its sending leader opened it."""

    source: str
    block_table: tuple[int, ...]
    tenant: str
    salt: str
    tokens: tuple[int, ...]
    attempt_id: str


class Surroundings(Protocol):
    """What a worker needs of the world."""

    scheduler: Scheduler
    rng: random.Random
    network: Network
    model: ModelKV
    book: InjectionBook
    lease_s: float
    hold_s: float
    verify: bool
    is_lockstep: bool
    costs: CostModel
    preempt_rate: float
    known: dict[TransferId, Known]

    def tell(self, event: history.Event) -> None:
        """Write history."""

    def said(self, worker: SimWorker, message: list[Any]) -> None:
        """The leader said something to its front."""

    def crashed(self, worker: SimWorker) -> None:
        """A process of the worker ended by itself."""


class SimChannel:
    """One end of a worker's inner channel: msgpack bodies, in order, a moment later."""

    def __init__(self, scheduler: Scheduler, rng: random.Random) -> None:
        self._scheduler = scheduler
        self._rng = rng
        self._arrives_s = 0.0
        self._inbox: deque[bytes] = deque()
        self.other: SimChannel | None = None
        self.arrived: Callable[[], None] = lambda: None
        self.socket = None

    def send(self, message: Any) -> None:
        """Queue one message for the other end."""
        other = self.other
        assert other is not None
        other.deliver(pack(message))

    def deliver(self, body: bytes) -> None:
        """A message for this end."""
        now = self._scheduler.now()
        self._arrives_s = max(self._arrives_s, now + 0.0003 * self._rng.random())
        self._scheduler.at(self._arrives_s, lambda: self._arrive(body))

    def _arrive(self, body: bytes) -> None:
        self._inbox.append(body)
        self.arrived()

    def drain(self) -> Iterator[Any]:
        """Every message that is there, and those that come while the ones before are worked on."""
        while self._inbox:
            yield unpack(self._inbox.popleft())

    @property
    def holds_plan(self) -> bool:
        """Does a step wait to be computed?"""
        return any(body.startswith(_PLAN) for body in self._inbox)

    def close(self) -> None:
        """Nothing to free."""


class _FrontChannel(SimChannel):
    """The leader's end of its channel to the front, which is not simulated: what it is told is handed on."""

    def __init__(self, scheduler: Scheduler, rng: random.Random, hear: Callable[[list[Any]], None]) -> None:
        super().__init__(scheduler, rng)
        self._hear = hear

    def send(self, message: Any) -> None:
        """To the front, and so to routers."""
        self._hear(unpack(pack(message)))


class KnowingRunner(SimRunner):
    """A SimRunner that also knows which tokens a sequence has.

    By itself it can tell that KV belongs to no sequence; only with the tokens, that it belongs to another one.
    """

    tokens_of: Callable[[BatchEntry], tuple[int, ...] | None]

    def _verified_states(self, entry: BatchEntry, table: npt.NDArray[np.int64], num_tokens: int) -> Words:
        states = super()._verified_states(entry, table, num_tokens)
        tokens = self.tokens_of(entry)
        if tokens is not None:
            wanted = oracle.states(self.layout.model, entry.tenant, entry.salt, tokens)[:num_tokens]
            self._check(entry, 0, 0, states.reshape(-1)[: len(wanted)] == wanted)
        return states


def _tokens_of(frame: Data, known: Known) -> range:
    """Positions that a frame carries."""
    first = frame.first_unit * UNIT_TOKENS
    return range(first, min(first + frame.num_units * UNIT_TOKENS, len(known.tokens)))


def _source_blocks(session: Session, frame: Data, known: Known) -> set[int]:
    """Where a frame's bytes lay in the sender's pool."""
    size = session.plan.source.geometry.block_size
    return {known.block_table[position // size] for position in _tokens_of(frame, known)}


class Rank:
    """One rank: a process with an engine thread and a transfer thread, and the guard of its pool's memory."""

    def __init__(self, worker: SimWorker, tp_rank: int) -> None:
        world, shape = worker.world, worker.shape
        self._worker = worker
        self._world = world
        self.tp_rank: Final = tp_rank
        self.process: Final = Process(f"{worker.key}#{tp_rank}")
        geometry = KVGeometry(shape.tp_size, shape.block_size, shape.num_blocks)
        self.layout: Final = KVLayout(world.model, geometry, tp_rank)
        self.runner: Final = KnowingRunner(
            self.layout,
            oracle.VOCAB_SIZE,
            cost=world.costs,
            clock=world.scheduler,
            sleep=self._compute,
            verify_all=True,
        )
        self.runner.tokens_of = worker.tokens_of
        buffer = self.runner.kv_buffer()
        self.view: Final = PoolView(self.layout, buffer)
        self.pool_bytes: Final = buffer
        self.transfer_actor: Final = Actor(
            world.scheduler, world.rng, self.process, self._transfer_turn, _THREAD_DELAY_S
        )
        config = EndpointConfig(
            worker_id=shape.name,
            incarnation=worker.incarnation,
            layout=self.layout,
            secret=oracle.SECRET,
            host=shape.name,
            transports=shape.transports,
            credit_bytes=shape.credit_bytes,
            lease_s=world.lease_s,
            max_control_bytes=2**20,
            verify=world.verify,
        )
        unix_path = f"{shape.name}/{tp_rank}" if "shm" in shape.transports else ""
        address = PeerRank(tp_rank, shape.name, 1000 + tp_rank, unix_path)
        self.endpoint: Final = SimEndpoint(
            config,
            buffer,
            self.runner.kv_fd(),
            address,
            world.scheduler,
            LandingFaults(world.book) if world.book.landing_rate else None,
            world.network,
            self,
            self.transfer_actor.poke,
        )
        self.hook: Final = TransferHook(self.endpoint)
        self.is_ended = False

    def die(self, *, silently: bool) -> None:
        """The process is gone. Idempotent."""
        if self.is_ended:
            return
        self.is_ended = True
        self.process.kill()
        for listener in self.endpoint.listeners.values():
            listener.close(silently=silently)
        self.endpoint.thread.die(silently=silently)
        self.view.release()
        self.runner.close()

    def _compute(self, seconds: float) -> None:
        """A layer takes its time; everybody else goes on meanwhile."""
        scheduler = self._world.scheduler
        if scheduler.depth <= _MAX_DEPTH:  # or who began first would wait for all who began later
            scheduler.run(scheduler.now() + seconds)
        if self.process.is_dead:
            raise Killed

    def _transfer_turn(self) -> None:
        thread = self.endpoint.thread
        try:
            thread.take_turn()
        except Killed:
            return
        except Exception:
            self._worker.defect(f"transfer thread of rank {self.tp_rank}", traceback.format_exc())
            return
        self.transfer_actor.poke_at(thread.next_tick_s)

    # Watcher.

    def before_write(self, view: memoryview) -> None:
        """INV-9: bytes go only into blocks that a transfer holds."""
        if view.obj is not self.pool_bytes.obj:
            return
        place = self.view.block_at(address_of(view))
        if place is not None and not self._worker.is_writable({place[1]}):
            self._worker.breach("INV-9", f"rank {self.tp_rank} writes into block {place[1]} that no transfer holds")

    def before_digests(self, transfer_id: TransferId, num_tokens: int) -> None:
        """Wrong bytes in the source from here on get a digest that is right."""
        if self._spoils:
            self._worker.spoil_source(self, transfer_id, num_tokens)

    def before_frame(self) -> None:
        """The moment at which wrong bytes in the source are the likeliest to travel, under digests that are older."""
        if self._spoils:
            self._worker.spoil_source()

    @property
    def _spoils(self) -> bool:
        book = self._world.book
        return bool(book.source_rate and book.is_on and self._world.rng.random() < book.source_rate)

    def digested(self, frame: Data) -> None:
        """INV-8: a digest vouches for blocks, so they must still be the sequence's own."""
        known = self._world.known.get(frame.transfer_id)
        if known is not None and not self._worker.holds(known):
            self._worker.breach("INV-8", f"rank {self.tp_rank} made a digest over blocks that {known.attempt_id} lost")

    def landing(self, connection: Connection, frame: Data, landing: Landing) -> None:
        """INV-9 for bytes that this rank fetches itself."""
        if connection.is_fetched and not self._worker.is_writable(self._blocks_of(landing)):
            self._worker.breach("INV-9", f"rank {self.tp_rank} fetches into blocks that no transfer holds")

    def arrived(self, connection: Connection, arrival: Arrival) -> None:
        """Compare a frame with what the request's own tokens make it; if it was verified, it must be that."""
        frame, book, world = arrival.frame, self._world.book, self._world
        verified = arrival.is_verified
        known = world.known.get(frame.transfer_id)
        table = self._worker.grants.get(frame.transfer_id)
        is_right = known is not None and table is not None and self._is_right(connection, frame, known, table)
        was_spoilt = book.arrived(name_of(frame), b"".join(arrival.views()), verified=verified, is_right=is_right)
        if known is None:
            return
        if not verified:
            # Fetched bytes may be late, and wire faults change what is taken for a payload; else it is a false alarm.
            is_clean = not (was_spoilt or connection.is_fetched or book.wire_rate or book.is_tainted(known.source))
            if is_clean:
                self._worker.breach("INV-7", f"rank {self.tp_rank} refused a frame that nobody had spoilt")
            if not is_right and connection.session is not None:
                for block in _source_blocks(connection.session, frame, known):
                    book.caught(known.source, frame.source_rank, block)
            return
        self._worker.num_landed += 1
        is_granted = self._worker.is_writable(self._blocks_of(arrival.landing))
        if is_right and is_granted:
            return
        is_tainted = table is not None and book.is_tainted(known.source)
        if is_tainted and table is not None and connection.session is not None:
            size, source = self.layout.geometry.block_size, _source_blocks(connection.session, frame, known)
            targets = {table[position // size] for position in _tokens_of(frame, known)}
            book.spread(known.source, source, self._worker.key, self.tp_rank, targets)
        name = f"{self._worker.key}#{self.tp_rank}"
        transfer = frame.transfer_id.hex()[:8]
        world.tell(history.Landed(world.scheduler.now(), name, transfer, is_right, is_granted, is_tainted))

    def _is_right(self, connection: Connection, frame: Data, known: Known, table: tuple[int, ...]) -> bool:
        """Are the bytes that a frame brought what the request's tokens make them?"""
        assert connection.session is not None
        states = oracle.states(self._world.model, known.tenant, known.salt, known.tokens)
        tokens = _tokens_of(frame, known)
        for layer in range(frame.first_layer, frame.first_layer + frame.num_layers):
            side = connection.session.plan.destination_sides[layer]
            heads = slice(side.first_head, side.first_head + side.num_heads)
            if not self.view.is_right(layer, table, tokens, states, heads):
                return False
        return True

    def link_lost(self, connection: Connection, sock: SimSocket, reason: str) -> None:
        """Injected corruption on the way here has been noticed, or will never be."""
        if sock.incoming is not None:
            self._world.book.link_lost(sock.incoming, reason)

    def preempt(self) -> None:
        """Sometimes others run between two steps of this thread, its own engine thread among them."""
        world = self._world
        if world.preempt_rate and world.rng.random() < world.preempt_rate:
            self._compute(world.rng.uniform(0.0, 0.003))

    def opened(self, request: SendRequest) -> None:
        """The leader's request says whose tokens these are."""
        if self.tp_rank == 0:
            _, packed = unpack(request.reserve_payload)
            inner = codec.unpack_request(packed)
            self._world.known[request.transfer_id] = Known(
                self._worker.key,
                request.block_table,
                inner.tenant,
                inner.cache_salt,
                inner.token_ids,
                inner.attempt_id,
            )

    def _blocks_of(self, landing: Landing) -> set[int]:
        blocks: set[int] = set()
        for layer, runs in landing.parts:
            size = self.layout.block_bytes(layer)
            for start, length in runs.tolist():
                blocks.update(range(start // size, -(-(start + length) // size)))
        return blocks


class SimWorker:
    """One start of one worker."""

    def __init__(self, world: Surroundings, shape: Shape, number: int) -> None:
        self.world: Final = world
        self.shape: Final = shape
        self.incarnation: Final = f"i{number}"
        self.key: Final = f"{shape.name}/{self.incarnation}"
        self.is_dead = False
        self.num_landed = 0
        self._num_turns = 0
        self.ranks: Final = [Rank(self, tp_rank) for tp_rank in range(shape.tp_size)]
        first = self.ranks[0]
        scheduler, rng = world.scheduler, world.rng
        group = Group(None, "", 1, first.endpoint, first.hook)  # type: ignore[arg-type]
        runner = GroupRunner(first.runner, group)
        config = EngineConfig(
            block_size=shape.block_size,
            num_blocks=shape.num_blocks,
            max_model_len=oracle.MAX_MODEL_LEN,
            max_num_seqs=16,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            vocab_size=oracle.VOCAB_SIZE,
        )
        self.hasher: Final = PrefixHasher(oracle.PREFIX_SECRET, world.model.fingerprint)
        self.engine: Final = LocalEngine(config, runner, self.hasher, scheduler)
        self.front: Final = _FrontChannel(scheduler, rng, lambda message: world.said(self, message))
        self.leader: Final = Leader(
            self.engine,
            first.endpoint,
            group,
            first.hook,
            self.front,  # type: ignore[arg-type]
            RolePolicy(shape.role, accepts_transfers=shape.role != "prefill", hold_s=world.hold_s),
            scheduler,
            tp_size=shape.tp_size,
        )
        runner.before_step = self.leader.before_step
        first.hook.on_layer = self.leader.on_layer
        self._leader_actor = Actor(scheduler, rng, first.process, self._lead, _THREAD_DELAY_S)
        self.front.arrived = self._leader_actor.poke
        first.endpoint.set_wakeup(self._leader_actor.poke)
        self._followers: list[tuple[SimChannel, Actor]] = []
        for rank in self.ranks[1:]:
            group.followers.append(self._follow(rank))  # type: ignore[arg-type]
        self._leader_actor.poke()

    @property
    def peer(self) -> PeerWorker:
        """As other workers reach it."""
        return PeerWorker(self.shape.name, self.incarnation, tuple(rank.endpoint.address for rank in self.ranks))

    @property
    def is_stopped(self) -> bool:
        """Is any of its processes stopped?"""
        return any(rank.process.is_stopped for rank in self.ranks)

    def command(self, *message: Any) -> None:
        """The front tells the leader."""
        if not self.is_dead:
            self.front.deliver(pack(message))

    def connect(self, peer: PeerWorker) -> None:
        """The supervisor names a worker that this one may send to."""
        for rank in self.ranks:
            if not rank.is_ended:
                rank.endpoint.connect(peer)

    def kill(self, *, silently: bool = False) -> None:
        """All its processes are gone. Idempotent."""
        self.is_dead = True
        for rank in self.ranks:
            rank.die(silently=silently)

    def close_in_order(self) -> None:
        """As SIGTERM: endpoints say goodbye, then the processes end."""
        for rank in self.ranks:
            if not rank.is_ended:
                rank.endpoint.thread.shut_down("the endpoint was closed")
                rank.is_ended = True
                rank.process.kill()
                for listener in rank.endpoint.listeners.values():
                    listener.close()
                rank.view.release()
                rank.runner.close()
        self.is_dead = True

    # Turns.

    def _lead(self) -> None:
        if self.world.is_lockstep and any(channel.holds_plan for channel, _ in self._followers):
            return  # a rank that has not computed the last step keeps the others waiting; it pokes when it has
        if not self._guarded("leader", self.leader.turn):
            return
        self._num_turns += 1
        if self._num_turns % _AUDIT_EVERY == 0:
            self._audit()
        if self.engine.has_work():
            self._leader_actor.poke(0.0005 if self.world.costs.decode_s_per_step else 0.002)
        self._leader_actor.poke_at(self.world.scheduler.now() + _TICK_S)

    def _follow(self, rank: Rank) -> SimChannel:
        scheduler, rng = self.world.scheduler, self.world.rng
        ours, theirs = SimChannel(scheduler, rng), SimChannel(scheduler, rng)
        ours.other, theirs.other = theirs, ours
        follower = Follower(rank.runner, rank.endpoint, rank.hook, theirs)  # type: ignore[arg-type]

        def turn() -> None:
            if self._guarded(f"follower {rank.tp_rank}", follower.turn):
                self._leader_actor.poke()

        actor = Actor(scheduler, rng, rank.process, turn, _THREAD_DELAY_S)
        theirs.arrived = actor.poke
        ours.arrived = self._leader_actor.poke
        rank.endpoint.set_wakeup(actor.poke)
        self._followers.append((theirs, actor))
        return ours

    def _guarded(self, where: str, turn: Callable[[], None]) -> bool:
        """Take a turn; False if that was the end of the process."""
        try:
            turn()
        except Killed:
            return False
        except TellTaleMismatch as error:
            self._mismatch(str(error))
            return False
        except CorruptPool as error:
            self._end_as_corrupt(str(error))
            return False
        except Exception:
            self.defect(where, traceback.format_exc())
            return False
        return not self.is_dead

    def _mismatch(self, detail: str) -> None:
        """Wrong KV was met: the process ends before a token of it is chosen."""
        book = self.world.book
        is_tainted = book.is_tainted(self.key)
        rank = int(detail.split("rank ")[1].split(",")[0])
        block = int(detail.split("(block ")[1].split(")")[0])
        book.caught(self.key, rank, block)
        self.world.tell(history.Mismatch(self.world.scheduler.now(), self.key, detail, is_tainted))
        self.world.crashed(self)

    def _end_as_corrupt(self, detail: str) -> None:
        """A peer refused KV that is not what it was when its digests were made."""
        is_tainted = self.world.book.is_tainted(self.key)
        self.world.tell(history.Mismatch(self.world.scheduler.now(), self.key, detail, is_tainted))
        self.world.crashed(self)

    def defect(self, where: str, detail: str) -> None:
        """Code raised what it must not."""
        last = detail.strip().splitlines()
        self.breach("DEFECT", f"{where}: {last[-1]} ({' '.join(line.strip() for line in last[-5:-1])})")
        self.world.crashed(self)

    def breach(self, invariant: str, detail: str) -> None:
        """An invariant is broken as we watch."""
        self.world.tell(history.Breach(self.world.scheduler.now(), self.key, invariant, detail))

    # What the ledger says.

    @property
    def grants(self) -> dict[TransferId, tuple[int, ...]]:
        """Destination blocks of every transfer that is being received."""
        items = self.leader._receiving._by_transfer.items()
        return {transfer_id: item.reservation.block_table for transfer_id, item in items}

    def is_writable(self, blocks: set[int]) -> bool:
        """Does one transfer hold all these blocks, alone, and may it write into them?"""
        pool = self.engine._scheduler.pool
        for seq in self.engine._seqs.values():
            if seq.state in _WRITABLE and blocks <= set(seq.block_table):
                return all(pool.num_holds(block) == 1 and pool.key_of(block) is None for block in blocks)
        return False

    def tokens_of(self, entry: BatchEntry) -> tuple[int, ...] | None:
        """The tokens whose KV a step leaves in the pool; None if the sequence has ended meanwhile (a late follower)."""
        seq = self.engine._seqs.get(entry.attempt_id)
        return None if seq is None else tuple(seq.token_ids[: entry.start + len(entry.token_ids)])

    def holds(self, known: Known) -> bool:
        """Does the sequence of a transfer that this worker sends still hold its source blocks?"""
        seq = self.engine._seqs.get(known.attempt_id)  # type: ignore[call-overload]
        return seq is not None and tuple(seq.block_table[: len(known.block_table)]) == known.block_table

    def _audit(self) -> None:
        try:
            audit_ledger(self.engine)
        except AssertionError as error:
            self.breach("INV-1", str(error) or "the ledger's audit failed")
        stats = self.engine.stats()
        if sum(stats.blocks_by_state.values()) != stats.num_blocks:
            self.world.tell(
                history.Ledger(self.world.scheduler.now(), self.key, stats.blocks_by_state, stats.num_blocks)
            )

    @property
    def is_at_rest(self) -> bool:
        """Is nothing left of any request?"""
        stats = self.engine.stats()
        return (
            not any(stats.seqs_by_state.values())
            and not len(self.leader._sending)
            and not len(self.leader._receiving)
            and not any(self._num_open(rank) for rank in self.ranks)
        )

    def _num_open(self, rank: Rank) -> int:
        stats = rank.endpoint.stats()
        return stats.open_sends + stats.open_receives

    @property
    def num_stale(self) -> int:
        """Late frames that were refused and counted."""
        return sum(rank.endpoint.stats().stale_frames_dropped for rank in self.ranks)

    def rest(self, sequences: list[tuple[str, str, tuple[int, ...]]]) -> history.Rest:
        """How the worker looks at rest; `sequences` are all (tenant, salt, tokens) that may be cached."""
        stats = self.engine.stats()
        return history.Rest(
            self.world.scheduler.now(),
            self.key,
            stats.blocks_by_state,
            stats.num_blocks,
            stats.seqs_by_state,
            sum(self._num_open(rank) for rank in self.ranks),
            len(self.leader._sending),
            len(self.leader._receiving),
            self._num_wrong_cached(sequences),
        )

    def _num_wrong_cached(self, sequences: list[tuple[str, str, tuple[int, ...]]]) -> int:
        """INV-8, INV-10: what the prefix cache offers is what its key says, on every rank."""
        if self.world.book.is_tainted(self.key):
            return 0
        size, pool = self.shape.block_size, self.engine._scheduler.pool
        by_key = oracle.prefix_keys(self.hasher, size, sequences)
        num_wrong = 0
        for block in range(self.shape.num_blocks):
            key = pool.key_of(block)
            found = None if key is None else by_key.get(key)
            if key is None:
                continue
            if found is None:
                num_wrong += 1  # nobody ever asked for such a sequence
                continue
            tenant, salt, tokens = found
            states = oracle.states(self.world.model, tenant, salt, tokens)
            table = [block] * (len(tokens) // size)
            last = range(len(tokens) - size, len(tokens))
            for rank, layer in itertools.product(self.ranks, range(len(self.world.model.layers))):
                if not rank.view.is_right(layer, table, last, states, slice(None)):
                    num_wrong += 1
        return num_wrong

    # Faults.

    def spoil_source(
        self, rank: Rank | None = None, transfer_id: TransferId | None = None, num_tokens: int = 0
    ) -> bool:
        """Put wrong bytes into KV that is being handed over; False if there is none.

        Into what a rank is about to make digests of, if that is given, which only a tell-tale can see; else into
        anything, which mostly has its digests.
        """
        rng = self.world.rng
        sendings = [
            sending
            for sending in self.leader._sending._by_attempt.values()
            if sending.num_written
            and sending.request.attempt_id in self.engine._seqs
            and transfer_id in (None, sending.transfer_id)
        ]
        if not sendings:
            return False
        sending = rng.choice(sendings)
        table = self.engine.block_table(sending.request.attempt_id)
        num_blocks = -(-sending.num_written // self.shape.block_size)
        level = corruption.BELOW
        if rank is None:
            rank, blocks = rng.choice(self.ranks), table[:num_blocks]
        else:
            level, blocks = corruption.ABOVE, table[-(-num_tokens // self.shape.block_size) - 1 : num_blocks]
        block, layer = rng.choice(blocks), rng.randrange(len(self.world.model.layers))
        if rank.is_ended:
            return False
        view = self._block_bytes(rank, layer, block)
        other_layer = rng.randrange(len(self.world.model.layers))
        others = self._block_bytes(rank, other_layer, rng.randrange(self.shape.num_blocks))
        kind = spoil_bytes(view, rng, others)
        if kind is not None:
            self.world.book.spoil(self.key, rank.tp_rank, block, level, kind)
        return kind is not None

    def _block_bytes(self, rank: Rank, layer: int, block: int) -> memoryview:
        begin = rank.layout.block_offset(layer, block)
        return rank.pool_bytes[begin : begin + rank.layout.block_bytes(layer)]
