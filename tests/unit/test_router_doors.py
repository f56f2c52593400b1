"""Keys, places and metrics: the small parts in front of every request."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.errors import InvalidRequest, Overloaded, Unauthorized
from router.admission import Admission
from router.api_keys import load_api_keys
from router.metrics import Histogram


def keys_file(tmp_path: Path, text: str, mode: int = 0o600) -> str:
    file = tmp_path / "keys"
    file.write_text(text)
    file.chmod(mode)
    return str(file)


def test_without_keys_everybody_is_the_default_tenant() -> None:
    keys = load_api_keys(None)
    assert keys.tenant(None) == "default"
    assert keys.tenant("Bearer whatever") == "default"


def test_a_key_names_its_tenant(tmp_path: Path) -> None:
    keys = load_api_keys(keys_file(tmp_path, "# ours\n\nalpha\nbeta acme # theirs\n"))
    assert keys.tenant("Bearer alpha") == "default"
    assert keys.tenant("bearer  beta ") == "acme"


@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer gamma", "alpha", "Basic alpha", "Bearer Alpha"]
)
def test_anything_else_is_refused(tmp_path: Path, given: str | None) -> None:
    keys = load_api_keys(keys_file(tmp_path, "alpha\n"))
    with pytest.raises(Unauthorized):
        keys.tenant(given)


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [("alpha", 0o644, "chmod 600"), ("# none", 0o600, "no API key"), ("a b c", 0o600, ":1: expected")],
)
def test_a_file_that_protects_nothing_is_refused_at_start(tmp_path: Path, text: str, mode: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        load_api_keys(keys_file(tmp_path, text, mode))


def test_places_are_bounded_and_given_back_once() -> None:
    async def main() -> None:
        admission = Admission(3)
        release = admission.admit(2)
        with pytest.raises(Overloaded):
            admission.admit(2)
        with pytest.raises(InvalidRequest):
            admission.admit(4)
        other = admission.admit(1)
        idle = asyncio.create_task(admission.idle())
        release()
        release()
        assert admission.num_admitted == 1
        other()
        await asyncio.wait_for(idle, 1)

    asyncio.run(main())


def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 2.0):
        histogram.observe(value)
    assert histogram._counts == [2, 1, 1]
    assert histogram._sum == pytest.approx(2.65)
