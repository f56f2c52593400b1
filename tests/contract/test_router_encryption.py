"""Router and workers over TLS: the same service, nothing readable on the wire, and misfits named."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.support.fake_worker import SECRET, FakeCluster, Site, site
from tests.support.relay import Relay

PROMPT = "a secret prompt"


def run(
    tls_secret: bytes | None, encrypt: bool, scenario: Callable[[Site], Awaitable[None]], **options: object
) -> None:
    """A router, which encrypts or not, with one worker, which does or does not under some secret."""

    async def main() -> None:
        cluster = FakeCluster()
        async with site(cluster, encrypt=encrypt, **options) as here:
            worker = cluster.add("mixed-0", "mixed")
            worker.tls_secret = tls_secret
            await worker.start()
            try:
                await scenario(here)
            finally:
                await worker.die()

    asyncio.run(main())


@pytest.mark.parametrize("encrypt", [False, True])
def test_a_prompt_can_be_read_between_router_and_worker_exactly_when_they_do_not_encrypt(encrypt: bool) -> None:
    async def scenario(here: Site) -> None:
        worker = here.cluster.workers["mixed-0"]
        with Relay(("127.0.0.1", worker.port)) as relay:
            address = f"127.0.0.1:{relay.address[1]}"
            here.router.set_members([{"worker_id": "mixed-0", "address": address}])
            async with asyncio.timeout(10):
                await here.serving.wait()
            answer = await here.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 15})
            assert answer.json()["choices"][0]["text"] == PROMPT
            wire = bytes(relay.seen["to target"] + relay.seen["back"])
            here.router.set_members([])
        told = bytes(worker.started[0].token_ids)  # varints of a byte tokenizer: the packed field as it travels
        assert (told in wire) is not encrypt
        assert (b"mixed-0" in wire) is not encrypt

    run(SECRET if encrypt else None, encrypt, scenario)


@pytest.mark.parametrize(
    ("tls_secret", "encrypt", "words"),
    [
        (None, True, "it does not encrypt, this router does"),
        (SECRET, False, "perhaps it encrypts and this router does not"),
        (b"another cluster's", True, "another secret"),
    ],
)
def test_a_worker_with_other_encryption_is_not_used_and_the_reason_is_named(
    tls_secret: bytes | None, encrypt: bool, words: str
) -> None:
    async def scenario(here: Site) -> None:
        here.router.set_members(here.cluster.fleet())
        async with asyncio.timeout(10):
            while words not in here.router.fleet.links["mixed-0"].why_lost:  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # a failed attempt to connect is no event
        assert not here.serving.is_set()

    run(tls_secret, encrypt, scenario)
