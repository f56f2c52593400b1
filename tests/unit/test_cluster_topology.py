"""Configuration becomes workers, places and specifications."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from baton.config import ConfigError, load_config
from baton.specs import FrontSpec, RankSpec, RouterSpec, from_json
from cluster import topology
from cluster.topology import ModelChoice, Modules, Orders

_MODEL = ModelChoice("/models/tiny", "tiny")
_SECRET = b"0123456789abcdef"


def plan(**settings: Any) -> list[tuple[str, str, int]]:
    config = load_config(settings={f"topology.{key}": value for key, value in settings.items()})
    return [(worker.worker_id, worker.role, worker.tp_size) for worker in topology.plan_workers(config, [])]


def test_one_prefill_and_one_decode_worker_by_default() -> None:
    assert plan() == [("prefill-0", "prefill", 1), ("decode-0", "decode", 1)]


def test_mixed_alone_is_aggregated_serving() -> None:
    assert plan(mixed=2) == [("mixed-0", "mixed", 1), ("mixed-1", "mixed", 1)]


def test_mixed_beside_roles_that_are_asked_for() -> None:
    assert plan(mixed=1, prefill=1) == [("prefill-0", "prefill", 1), ("mixed-0", "mixed", 1)]


def test_prefill_may_have_another_tensor_parallelism() -> None:
    assert plan(tp=4, prefill_tp=2) == [("prefill-0", "prefill", 2), ("decode-0", "decode", 4)]


def test_every_rank_has_cores_of_its_own_if_there_are_enough() -> None:
    config = load_config(settings={"topology.tp": 2, "topology.prefill_tp": 1, "engine.threads_per_rank": 2})
    prefill, decode = topology.plan_workers(config, [0, 1, 4, 5, 6, 7])
    assert prefill.cores == ((0, 1),)
    assert decode.cores == ((4, 5), (6, 7))


def test_no_rank_is_pinned_if_cores_are_too_few() -> None:
    workers = topology.plan_workers(load_config(settings={"topology.tp": 2}), [0, 1, 2])
    assert [worker.cores for worker in workers] == [((), ()), ((), ())]


def test_an_order_has_a_place_per_rank_and_the_front_beside_rank_0(tmp_path: Path) -> None:
    config = load_config(
        settings={
            "topology.tp": 2,
            "engine.block_size": 32,
            "engine.kv_cache_bytes": 1234,
            "engine.max_num_seqs": 7,
            "engine.enable_prefix_caching": False,
            "transfer.transports": ["tcp"],
            "transfer.lease_s": 3,
            "model.dtype": "float32",
            "log_level": "debug",
        }
    )
    worker = topology.plan_workers(config, range(4))[1]
    start = topology.worker_start("decode-0", "abcdef0123456789")
    order = Orders(config, _MODEL, _SECRET, Modules()).worker(worker, start)
    assert [[process.name for process in place.processes] for place in order.places] == [
        ["rank 0", "front"],
        ["rank 1"],
    ]
    assert order.private_dir == "w/decode-0-abcdef"
    rank = from_json(RankSpec, order.places[1].processes[0].spec)
    assert (rank.worker_id, rank.role, rank.tp_rank, rank.tp_size) == ("decode-0", "decode", 1, 2)
    assert (rank.block_size, rank.kv_cache_bytes, rank.max_num_seqs, rank.enable_prefix_caching) == (32, 1234, 7, False)
    assert (rank.transports, rank.lease_s, rank.log_level, rank.cores) == (("tcp",), 3.0, "debug", (3,))
    assert (rank.model.path, rank.model.dtype, rank.model.kind) == ("/models/tiny", "float32", "native")
    front = from_json(FrontSpec, order.places[0].processes[1].spec)
    assert (front.worker_id, front.incarnation, front.worker_dir) == ("decode-0", rank.incarnation, rank.worker_dir)
    assert order.places[0].processes[0].command == ("decode_worker", "rank")
    assert order.places[0].processes[1].command == ("decode_worker", "front")


def test_one_switch_encrypts_every_rank_every_front_and_the_router(tmp_path: Path) -> None:
    for encryption, kv in (("none", ("shm", "tcp")), ("tls", ("shm", "tcp+tls"))):
        config = load_config(settings={"cluster.encryption": encryption})
        orders = Orders(config, _MODEL, _SECRET, Modules())
        for plan in topology.plan_workers(config, []):
            order = orders.worker(plan, topology.worker_start(plan.worker_id, "abcdef"))
            rank, front = order.places[0].processes
            assert from_json(RankSpec, rank.spec).transports == kv
            assert from_json(FrontSpec, front.spec).encrypt == (encryption == "tls")
        router = orders.router(0, "127.0.0.1", (1, 2), {}).processes[0]
        assert from_json(RouterSpec, router.spec).encrypt == (encryption == "tls")


def test_ranks_on_cuda_are_told_who_computes_prompts() -> None:
    config = load_config(settings={"engine.device": "cuda", "engine.prompt_attention": "triton"})
    plan = topology.plan_workers(config, [])[0]
    order = Orders(config, _MODEL, _SECRET, Modules()).worker(plan, topology.worker_start(plan.worker_id, "00"))
    rank = from_json(RankSpec, order.places[0].processes[0].spec)
    assert (rank.device, rank.prompt_attention) == ("cuda", "triton")


@pytest.mark.parametrize(("role", "package"), [("prefill", "prefill_worker"), ("mixed", "decode_worker")])
def test_each_role_has_its_package(role: str, package: str) -> None:
    assert Modules().worker(role) == package


def test_the_simulated_engine_is_told_its_cost_model(tmp_path: Path) -> None:
    config = load_config(settings={"engine.kind": "sim", "sim.vocab_size": 99})
    worker = topology.plan_workers(config, [])[0]
    start = topology.worker_start("prefill-0", "00")
    order = Orders(config, topology.resolve_model(config), _SECRET, Modules()).worker(worker, start)
    rank = from_json(RankSpec, order.places[0].processes[0].spec)
    assert (rank.model.kind, rank.model.path, rank.model.sim["vocab_size"]) == ("sim", "", 99)


def test_the_router_is_told_all_that_the_configuration_says(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    config = load_config(
        settings={
            "router.host": "0.0.0.0",
            "router.api_key_file": str(keys),
            "router.max_body_bytes": 5000,
            "transfer.lease_s": 4.0,
        }
    )
    order = Orders(config, _MODEL, _SECRET, Modules()).router(0, config.router.host, (1, 2), {"a": 1})
    spec = from_json(RouterSpec, order.processes[0].spec)
    assert (spec.host, spec.port, spec.grpc_port, spec.max_body_bytes) == ("0.0.0.0", 1, 2, 5000)
    assert (spec.api_key_file, spec.model_dir, spec.served_model_name) == (str(keys), "/models/tiny", "tiny")
    assert (spec.status, spec.kv_lease_s) == ({"a": 1}, 4.0)


def test_a_local_model_is_named_after_its_directory(tmp_path: Path) -> None:
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    config = load_config(settings={"model.path": str(model)})
    assert topology.resolve_model(config) == ModelChoice(str(model), "my-model", str(model))
    named = load_config(settings={"model.path": str(model), "model.served_model_name": "m"})
    assert topology.resolve_model(named).name == "m"


def test_a_directory_without_a_config_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}: not a model directory"):
        topology.resolve_model(load_config(settings={"model.path": str(tmp_path)}))


@pytest.mark.parametrize("path", ["/no/such/dir", "./no/such", "no-such-model", "a/b/c"])
def test_a_missing_directory_is_refused_by_name(path: str) -> None:
    with pytest.raises(ConfigError, match=f"model.path: {path}: no such directory$"):
        topology.resolve_model(load_config(settings={"model.path": path}))


def test_no_model_means_the_embedded_demo() -> None:
    choice = topology.resolve_model(load_config())
    assert choice.name == "baton-demo"
    assert Path(choice.path, "config.json").is_file()


def test_number_formats_are_the_models_where_none_are_asked_for() -> None:
    demo = topology.resolve_model(load_config())
    for settings, expected in (
        ({}, {"dtype": "bfloat16", "kv_dtype": "bfloat16", "quantization": None}),
        (
            {"model.dtype": "float32", "model.quantization": "int8"},
            {"dtype": "float32", "kv_dtype": "float32", "quantization": "int8"},
        ),
        (
            {"engine.device": "cuda", "model.dtype": "bfloat16", "engine.kv_dtype": "fp8"},
            {"dtype": "bfloat16", "kv_dtype": "float8_e4m3fn", "quantization": None},
        ),
        ({"engine.kind": "sim"}, {}),
    ):
        assert topology.number_formats(load_config(settings=settings), demo) == expected
