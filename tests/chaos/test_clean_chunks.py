"""A digest that cries wolf would be switched off: whatever the transport and the layouts, clean chunks are accepted."""

from __future__ import annotations

import pytest

from tests.chaos.clean_chunks import PAIRINGS, Pairing, run


@pytest.mark.parametrize("pairing", PAIRINGS, ids=lambda pairing: "-".join(map(str, pairing)))
def test_no_clean_chunk_is_refused_and_every_byte_is_in_place(pairing: Pairing) -> None:
    num_verified, num_refused = run(pairing, 500, seed=1)
    assert num_verified >= 500
    assert num_refused == 0
