"""What is known of the links between workers."""

from __future__ import annotations

import asyncio

from cluster.kv_links import KVLinks


def test_a_pair_is_known_once_every_rank_of_the_sender_has_reported() -> None:
    async def main() -> None:
        links = KVLinks()
        links.expect("prefill-0", ["decode-0", "decode-1"], 2)
        for rank in ("rank 0", "rank 1"):
            links.heard("prefill-0", rank, "decode-0", "shm")
        links.heard("prefill-0", "rank 0", "decode-1", "tcp")
        await links.wait_until_known(0.01)
        assert links.transports() == {
            ("prefill-0", "decode-0"): "shm",
            ("prefill-0", "decode-1"): "tcp",
        }
        waiting = asyncio.create_task(links.wait_until_known(30))
        await asyncio.sleep(0)
        assert not waiting.done()
        links.heard("prefill-0", "rank 1", "decode-1", "")
        await asyncio.wait_for(waiting, 5)
        links.heard("prefill-0", "rank 0", "decode-1", "")
        assert links.transports()["prefill-0", "decode-1"] == "nothing"
        links.forget("decode-1")
        assert list(links.transports()) == [("prefill-0", "decode-0")]

    asyncio.run(main())
