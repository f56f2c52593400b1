"""Transfer events and counters of a follower rank on their way to the leader."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from kvtransfer import api

_KINDS: Final = {
    cls.__name__: cls for cls in (api.Received, api.Failed, api.Quiesced, api.Granted, api.Refused, api.Completed)
}


def pack_event(event: object) -> list[Any]:
    """Class name and field values."""
    return [type(event).__name__, *(getattr(event, item.name) for item in dataclasses.fields(event))]  # type: ignore[arg-type]


def unpack_event(packed: list[Any]) -> object:
    """Back from `pack_event`."""
    kind, *values = packed
    return _KINDS[kind](*values)


def pack_stats(stats: api.EndpointStats) -> dict[str, Any]:
    """For `EndpointStats(**packed)`."""
    return dataclasses.asdict(stats)
