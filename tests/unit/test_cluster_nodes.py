"""Which node takes a worker: a pure choice."""

from __future__ import annotations

from cluster.nodes import ROLE_LABEL, ROUTER_ROLE, ZONE_LABEL, Need, Node, Placed, choose, excluded_roles, why_none

A, B, C = (Node(name, f"10.0.0.{index}", 8.0) for index, name in enumerate("abc", start=1))
PREFILL, DECODE, ROUTER = Need("prefill", 1.0), Need("decode", 2.0), Need(ROUTER_ROLE, 0.0)


def place_all(nodes: list[Node], needs: list[Need]) -> str:
    placed: list[Placed] = []
    for need in needs:
        node = choose(nodes, need, placed)
        assert node is not None
        placed.append(Placed(node.node_id, need))
    return "".join(unit.node_id for unit in placed)


def test_replicas_of_a_role_spread_and_each_decode_worker_goes_where_prefill_is() -> None:
    assert place_all([A, B, C], [PREFILL, PREFILL, DECODE, DECODE]) == "abab"


def test_a_worker_that_does_not_fit_beside_its_peer_goes_to_its_peers_zone() -> None:
    near, far = (
        Node(name, f"10.0.1.{index}", 2.0, labels={ZONE_LABEL: zone})
        for index, (name, zone) in enumerate((("n", "z1"), ("f", "z2")))
    )
    first = Node("p", "10.0.1.9", 1.0, labels={ZONE_LABEL: "z1"})
    assert choose([far, near, first], DECODE, [Placed("p", PREFILL)]) == near
    assert choose([far, first], DECODE, [Placed("p", PREFILL)]) == far  # a preference, not a condition


def test_a_node_with_a_role_takes_that_role_only() -> None:
    decoder = Node("d", "10.0.2.1", 8.0, labels={ROLE_LABEL: "decode"})
    assert choose([decoder], PREFILL, []) is None
    assert choose([decoder], DECODE, []) == decoder
    assert choose([decoder], ROUTER, []) == decoder
    assert excluded_roles("decode") == "!in(mixed,prefill)"
    assert "10.0.2.1 is for decode only" in why_none([decoder], PREFILL, [])


def test_no_two_routers_share_a_node() -> None:
    assert choose([A, B], ROUTER, [Placed("a", ROUTER)]) == B
    assert choose([A], ROUTER, [Placed("a", ROUTER)]) is None
    assert why_none([A], ROUTER, [Placed("a", ROUTER)]) == "it needs a node without a router: 10.0.0.1 has one"


def test_a_worker_of_too_many_ranks_is_refused_with_what_each_node_has() -> None:
    big = Need("decode", 16.0)
    assert choose([A, B], big, []) is None
    assert why_none([A, B], big, [Placed("b", DECODE)]) == (
        "it needs 16 CPUs on one node: 10.0.0.1 has 8 CPUs, 8 free, 10.0.0.2 has 8 CPUs, 6 free"
    )


def test_ranks_on_gpus_need_nodes_with_gpus() -> None:
    need = Need("decode", 2.0, 2.0)
    gpus = Node("g", "10.0.3.1", 8.0, 4.0)
    assert choose([A, gpus], need, []) == gpus
    assert choose([gpus], need, [Placed("g", need), Placed("g", need)]) is None
    assert str(need) == "2 CPUs and 2 GPUs"
