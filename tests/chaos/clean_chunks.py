"""Clean chunks through real endpoints: not one may be refused, and every byte must be where it belongs.

`python -m tests.chaos.clean_chunks --chunks 1000000`: a chunk is a data frame that a receiving rank has verified. Pairs
of workers differ in transport, tensor parallelism and block size; lengths, block tables, bytes and the steps in which
KV is written are drawn from the seed. Windows are as small as they can be, so that a frame carries one unit (16 tokens
of one layer). Exit status 1 on a false alarm.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from kvtransfer.api import Completed, Granted, ManifestReceived, Received, ReserveRequested
from tests.support.transfer import MODEL, Rank, Worker, closing, make_worker, open_send


class Pairing(NamedTuple):
    """Two workers that exchange KV."""

    transport: str
    source_tp: int
    destination_tp: int
    source_block: int
    destination_block: int


PAIRINGS: Final = tuple(
    Pairing(transport, *shape)
    for transport in ("tcp", "shm", "local")
    for shape in ((1, 1, 16, 16), (1, 2, 16, 64), (2, 1, 32, 16), (4, 4, 64, 64), (1, 1, 64, 32))
)
MAX_TOKENS: Final = 1024
_POOL_TOKENS: Final = 2 * MAX_TOKENS
_PATIENCE_S: Final = 20.0


def _write(rank: Rank, layer: int, table: Sequence[int], kv: np.ndarray, first: int, end: int) -> None:
    positions = np.arange(first, end)
    size, heads = rank.layout.geometry.block_size, rank.layout.heads(layer)
    tokens = kv[:, heads.start : heads.stop, first:end].transpose(2, 0, 1, 3)
    rank.layer_bytes(layer)[np.asarray(table)[positions // size], :, :, positions % size] = tokens


def _read(rank: Rank, layer: int, table: Sequence[int], num_tokens: int) -> np.ndarray:
    """[token, K|V, local head, dim bytes]."""
    positions = np.arange(num_tokens)
    size = rank.layout.geometry.block_size
    return rank.layer_bytes(layer)[np.asarray(table)[positions // size], :, :, positions % size]


def _table(rng: random.Random, worker: Worker, num_tokens: int) -> list[int]:
    geometry = worker.leader.layout.geometry
    return rng.sample(range(geometry.num_blocks), -(-num_tokens // geometry.block_size))


def transfer(rng: random.Random, source: Worker, destination: Worker) -> None:
    """One sequence of random length, from reservation to completion."""
    num_tokens = rng.randint(MAX_TOKENS // 2, MAX_TOKENS)
    first_token = 16 * rng.choice((0, 0, rng.randrange(num_tokens // 32)))
    draw = np.random.default_rng(rng.getrandbits(32)).integers
    kv = [
        draw(0, 256, (2, spec.num_kv_heads, num_tokens, spec.head_dim * MODEL.itemsize_bytes), dtype=np.uint8)
        for spec in MODEL.layers
    ]
    table, other = _table(rng, source, num_tokens), _table(rng, destination, num_tokens)
    transfer_id = open_send(source, destination, num_tokens, table)
    destination.leader.expect(ReserveRequested, transfer_id, _PATIENCE_S)
    for rank in destination.ranks:
        rank.endpoint.grant(transfer_id, other, num_tokens, first_token)
    source.leader.expect(Granted, transfer_id, _PATIENCE_S)
    step = rng.choice((128, 500, num_tokens))
    for first in range(0, num_tokens, step):
        end = min(first + step, num_tokens)
        for rank in source.ranks:
            rank.endpoint.will_write(table, first, end)
        for layer, tokens in enumerate(kv):
            for rank in source.ranks:
                _write(rank, layer, table, tokens, first, end)
                rank.endpoint.written(transfer_id, layer, end)
    source.leader.endpoint.finish(transfer_id, b"m")
    for rank in destination.ranks:
        rank.expect(Received, transfer_id, _PATIENCE_S)
        for layer, tokens in enumerate(kv):
            heads = rank.layout.heads(layer)
            got = _read(rank, layer, other, num_tokens)[first_token:]
            wanted = tokens[:, heads.start : heads.stop, first_token:].transpose(2, 0, 1, 3)
            assert (got == wanted).all(), f"layer {layer} of rank {rank.layout.tp_rank} holds other bytes"
    destination.leader.expect(ManifestReceived, transfer_id, _PATIENCE_S)
    for rank in destination.ranks[1:]:
        rank.endpoint.close_receive(transfer_id)
    destination.leader.endpoint.complete(transfer_id)
    source.leader.expect(Completed, transfer_id, _PATIENCE_S)
    for rank in source.ranks[1:]:
        rank.endpoint.close_send(transfer_id)


def run(pairing: Pairing, num_chunks: int, seed: int) -> tuple[int, int]:
    """(chunks verified, chunks refused or dropped) of transfers between one pair, until enough were verified."""
    rng = random.Random(f"{seed} {pairing}")
    with tempfile.TemporaryDirectory() as unix_dir:

        def worker(name: str, tp_size: int, block_size: int) -> Worker:
            return make_worker(
                name,
                transport=pairing.transport,
                unix_dir=unix_dir,
                tp_size=tp_size,
                block_size=block_size,
                num_blocks=_POOL_TOKENS // block_size,
                credit_bytes=1,
                lease_s=120.0,
            )

        source = worker("p", pairing.source_tp, pairing.source_block)
        destination = worker("d", pairing.destination_tp, pairing.destination_block)
        with closing(source, destination):
            while True:
                transfer(rng, source, destination)
                stats = [rank.endpoint.stats() for rank in destination.ranks]
                num_refused = sum(s.integrity_failures + s.stale_frames_dropped for s in stats)
                num_verified = sum(s.frames_verified for s in stats)
                if num_refused or num_verified >= num_chunks:
                    return num_verified, num_refused


def main() -> None:
    """Parse, run, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    began, total, refused = time.monotonic(), 0, 0
    for pairing in PAIRINGS:
        verified, bad = run(pairing, -(-args.chunks // len(PAIRINGS)), args.seed)
        total, refused = total + verified, refused + bad
        _say(f"  {pairing}: {verified} chunks verified, {bad} refused")
    seconds = time.monotonic() - began
    _say(f"seed {args.seed}: {total} clean chunks, {refused} false alarms, {total / seconds:.0f} chunks/s")
    sys.exit(1 if refused else 0)


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
