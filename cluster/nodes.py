"""The nodes of a Ray cluster as placement sees them, and which of them should take a unit. Pure; knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

ZONE_LABEL: Final = "baton.zone"
"""Nodes of one zone are near each other: prefill and decode workers prefer it over another."""
ROLE_LABEL: Final = "baton.role"
"""A node with this label takes workers of that role only. Routers, which need next to nothing, may be anywhere."""
ROUTER_ROLE: Final = "router"
_PEERS: Final = {"prefill": ("decode", "mixed"), "decode": ("prefill",), "mixed": ("prefill",)}


@dataclass(frozen=True, slots=True)
class Node:
    """One node: what it has in all, whoever uses it."""

    node_id: str
    address: str
    cpus: float
    gpus: float = 0.0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Need:
    """What a unit takes of one node: a worker's ranks share memory, so they are never on two."""

    role: str
    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        parts = [f"{amount:g} {name}" for amount, name in ((self.cpus, "CPUs"), (self.gpus, "GPUs")) if amount]
        return " and ".join(parts)


@dataclass(frozen=True, slots=True)
class Placed:
    """A unit that is on a node."""

    node_id: str
    need: Need


def choose(nodes: Sequence[Node], need: Need, placed: Sequence[Placed]) -> Node | None:
    """The best node for one more unit; None if none has room for it beside what is placed.

    Replicas of a role spread first. Then a worker goes where its peers are (KV moves in shared memory there), then to
    the zone where they are, then to the emptiest node. No two routers share a node: they listen on the same port.
    """
    fitting = [node for node in nodes if _why_not(node, need, placed) is None]
    if not fitting:
        return None
    zone_of = {node.node_id: node.labels.get(ZONE_LABEL) for node in nodes}
    peers = [unit.node_id for unit in placed if unit.need.role in _PEERS.get(need.role, ())]

    def cost(node: Node) -> tuple[float, float, float, float, str]:
        same = sum(unit.node_id == node.node_id and unit.need.role == need.role for unit in placed)
        zone = node.labels.get(ZONE_LABEL)
        in_zone = sum(zone is not None and zone_of.get(peer) == zone for peer in peers)
        return same, -peers.count(node.node_id), -in_zone, -_free(node, placed)[0], node.address

    return min(fitting, key=cost)


def why_none(nodes: Sequence[Node], need: Need, placed: Sequence[Placed]) -> str:
    """Why no node has room, node by node: one clause for the user."""
    reasons = [f"{node.address} {_why_not(node, need, placed) or 'has room'}" for node in nodes]
    if need.role == ROUTER_ROLE:
        return f"it needs a node without a router: {', '.join(reasons) or 'the cluster has no nodes'}"
    return f"it needs {need} on one node: {', '.join(reasons) or 'the cluster has no nodes'}"


def excluded_roles(role: str) -> str:
    """The value of a Ray label selector on ROLE_LABEL that leaves out the nodes of other roles."""
    return f"!in({','.join(sorted(_PEERS.keys() - {role}))})"


def _why_not(node: Node, need: Need, placed: Sequence[Placed]) -> str | None:
    if need.role == ROUTER_ROLE:
        has_one = any(unit.node_id == node.node_id and unit.need.role == ROUTER_ROLE for unit in placed)
        return "has one" if has_one else None
    wanted = node.labels.get(ROLE_LABEL)
    if wanted is not None and wanted != need.role:
        return f"is for {wanted} only"
    cpus, gpus = _free(node, placed)
    if need.cpus > cpus:
        return f"has {node.cpus:g} CPUs, {cpus:g} free"
    if need.gpus > gpus:
        return f"has {node.gpus:g} GPUs, {gpus:g} free"
    return None


def _free(node: Node, placed: Sequence[Placed]) -> tuple[float, float]:
    here = [unit.need for unit in placed if unit.node_id == node.node_id]
    return node.cpus - sum(need.cpus for need in here), node.gpus - sum(need.gpus for need in here)
