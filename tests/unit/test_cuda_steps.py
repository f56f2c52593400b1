"""Steps on a device that is as late as it may be: graphs by bucket, fed tokens, buffers that are not reused too soon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.triton_device import HAS_CUDA  # isort: skip  (before the kernels)

from baton.clock import ManualClock
from baton.kv_layout import DeviceMemory, KVGeometry, KVLayout, LayerSpec, ModelKV
from baton.prefix_hash import PrefixHasher
from baton.request import AttemptId, GenerateRequest, SamplingParams
from engine.comm import SingleComm
from engine.cuda.buckets import bucket_for, buckets, num_splits
from engine.cuda.cuts import cut
from engine.cuda.decoder import FusedDecoder
from engine.cuda.device import CudaUnavailable
from engine.cuda.inputs import InputBuffer, Shape, Tables
from engine.cuda.pool import DevicePool
from engine.cuda.steps import CudaSteps, is_chosen_on_device
from engine.engine import LocalEngine
from engine.model_config import read_model_config
from engine.models.decoder import optional_tensors, tensor_shapes
from engine.native import NativeRunner
from engine.overlap import OverlappingEngine
from engine.sampler import _threshold
from engine.types import PENDING, BatchEntry, EngineConfig, SampleSpec, StepPlan
from engine.weights import Checkpoint
from tests.support.drive import generate, join_one_by_one
from tests.support.fake_device import FakeDevice
from tests.support.tiny_models import VOCAB_SIZE, edit_config, make_model, random_prompt

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="tests/gpu runs the same on the CUDA device")

GREEDY = SamplingParams(temperature=0.0, max_tokens=100)
NUM_BLOCKS = 24


def entry(name: str, start: int, tokens: list[int], table: list[int], params: SamplingParams | None) -> BatchEntry:
    spec = None if params is None else SampleSpec(params, start + len(tokens))
    return BatchEntry(AttemptId(name), start, tokens, table, spec)


def test_buckets_end_with_the_largest_batch_and_hold_every_smaller_one() -> None:
    assert buckets(1) == (1,)
    assert buckets(6) == (1, 2, 4, 6)
    assert len(buckets(512)) == 43
    assert buckets(512)[-1] == 512
    for count in range(1, 701):
        size = bucket_for(count, buckets(700))
        assert size is not None
        assert count <= size <= count + max(8, count // 4)
    assert bucket_for(701, buckets(700)) is None


def test_a_context_is_split_only_where_programs_are_missing() -> None:
    assert num_splits(256, 8, 132) == 1
    assert num_splits(1, 8, 132) == 32
    assert num_splits(16, 8, 132) == 8


def test_a_step_is_packed_with_padding_that_names_nothing() -> None:
    device = FakeDevice()
    buffer = InputBuffer(device, Shape(16, 4, 4, 4), 64)
    sampled = SamplingParams(temperature=0.5, seed=7)
    entries = [entry("a", 9, [PENDING], [3, 5], GREEDY), entry("b", 4, [11, 12, 13], [2], sampled)]
    shape = Shape(6, 3, 3, 1)
    buffer.load(entries, shape, Tables(4, 100), [2, -1], [(1, 0)])
    device.record().wait()
    given = buffer.tensors(shape)
    assert given.tokens.tolist() == [PENDING, 11, 12, 13, 0, 0]
    assert given.sources.tolist() == [2, -1, -1, -1, -1, -1]
    assert given.positions.tolist() == [9, 4, 5, 6, -1, -1]
    assert given.token_seqs.tolist() == [0, 1, 1, 1, 0, 0]
    assert (given.starts.tolist(), given.num_new.tolist()) == ([9, 4, -1], [1, 3, 0])
    assert given.first_rows.tolist() == [0, 1, 4, 4]
    assert given.rows.tolist() == [0, 3, 0]
    assert given.temperatures.tolist() == [0.0, 0.5, 0.0]
    assert given.keys[0] == given.keys[2] == 0 != given.keys[1]
    coldest = SamplingParams(temperature=1e-320)
    buffer.load([entry("a", 9, [PENDING], [3, 5], coldest)], Shape(1, 1, 1, 0), Tables(4, 100), [2])
    device.record().wait()
    assert buffer.tensors(Shape(1, 1, 1, 0)).temperatures.tolist() == [1e-200]  # a logit over it stays finite
    buffer.load(entries, shape, Tables(4, 100), [2, -1], [(1, 0)])
    device.record().wait()
    assert (given.tile_seqs.tolist(), given.tile_begin.tolist()) == ([1], [0])
    begin = given.table_begin.tolist()
    assert [given.tables[begin[0]].item(), given.tables[begin[0] + 1].item(), given.tables[begin[1]].item()] == [
        3,
        5,
        2,
    ]


def test_a_host_buffer_is_not_packed_again_before_its_copy_is_done() -> None:
    device = FakeDevice()
    buffer = InputBuffer(device, Shape(4, 4, 4), 16)
    seen = []
    shape = Shape(1, 1, 1)
    for token in range(8):
        buffer.load([entry("a", 0, [token], [0], GREEDY)], shape, Tables(4, 100), [-1])
        device.run(lambda: seen.append(buffer.tensors(shape).tokens.item()))
    assert 0 < device.num_queued < 16  # the host ran ahead, but not without end
    device.record().wait()
    assert seen == list(range(8))


def test_block_tables_that_grow_and_are_replaced_are_followed() -> None:
    tables = Tables(2, 100)
    rng = np.random.default_rng(0)
    lists: dict[str, list[int]] = {name: [0] for name in "abcdefgh"}
    for _ in range(200):
        names = rng.choice(list(lists), 4, replace=False).tolist()
        for name in names:
            if rng.random() < 0.1:
                lists[name] = [int(rng.integers(100))]
            else:
                lists[name] += rng.integers(0, 100, rng.integers(0, 30)).tolist()
        entries = [entry(name, 0, [1], lists[name], None) for name in names]
        assert [row.tolist() for row in tables.rows(entries)] == [lists[name] for name in names]


def test_only_what_needs_nothing_of_the_host_is_chosen_on_the_device() -> None:
    def is_on_device(banned: tuple[int, ...] = (), **params: Any) -> bool:
        return is_chosen_on_device(SampleSpec(SamplingParams(**params), 3, banned_token_ids=banned))

    assert is_on_device(temperature=0.0, top_k=3)  # greedy: a cut changes nothing
    assert is_on_device(temperature=0.7)
    assert is_on_device(temperature=0.7, top_p=0.9)
    for params in ({"num_logprobs": 0}, {"presence_penalty": 0.1}, {"repetition_penalty": 1.2}):
        assert not is_on_device(temperature=0.7, **params)
    assert not is_on_device(temperature=0.0, logit_bias={1: 1.0})
    assert not is_on_device(temperature=0.0, banned=(1,))


def test_cuda_is_refused_by_name_where_there_is_none(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "llama", num_hidden_layers=1)
    with pytest.raises(CudaUnavailable, match="device cuda"):
        NativeRunner(model_dir, num_blocks=4, device="cuda")
    with pytest.raises(ValueError, match="device must be cpu"):
        NativeRunner(model_dir, num_blocks=4, device="tpu")


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_a_runner_on_a_device_runs_single_steps_too(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "llama", num_hidden_layers=1)
    reference = NativeRunner(model_dir, num_blocks=6, backend="reference")
    runner = NativeRunner(model_dir, num_blocks=6, cuda_device=FakeDevice(), max_num_seqs=2)
    assert runner.overlapping is runner
    assert isinstance(runner.kv_buffer(), DeviceMemory)
    assert generate(runner, random_prompt(1, 20), 4, chunk=12) == generate(reference, random_prompt(1, 20), 4)
    outside = BatchEntry(AttemptId("a"), 0, [3], [6], SampleSpec(GREEDY, 1))
    with pytest.raises(ValueError, match="names a block outside"):
        runner.run(StepPlan(1, [outside]))
    with pytest.raises(ValueError, match="did not choose"):
        runner.launch(StepPlan(2, [entry("b", 3, [PENDING], [1], GREEDY)]))
    runner.close()
    reference.close()


def test_cuts_keep_the_tokens_that_the_sampler_keeps() -> None:
    torch.manual_seed(0)
    cuts = [
        (1.0, 0, 1.0, 0.0),
        (0.7, 5, 1.0, 0.0),
        (1.3, 0, 0.6, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.9, 40, 0.8, 0.02),
        (0, 3, 0.5, 0),
    ]
    specs = [
        SampleSpec(SamplingParams(temperature=temperature, top_k=k, top_p=p, min_p=min_p, seed=seed), 9)
        for seed in range(7)
        for temperature, k, p, min_p in cuts
    ]
    logits = torch.randn(len(specs), VOCAB_SIZE) * 3
    logits[:, 10] = logits[:, 20]  # equals are kept or cut together
    device, shape = FakeDevice(), Shape(len(specs), len(specs), len(specs))
    buffer = InputBuffer(device, shape, 64)
    entries = [BatchEntry(AttemptId(str(row)), 8, [1], [0], spec) for row, spec in enumerate(specs)]
    buffer.load(entries, shape, Tables(64, 100), [-1] * len(specs))
    device.record().wait()
    given = buffer.tensors(shape)
    left = cut(logits, given.temperatures, given.log_min_p, given.top_p, given.top_k)
    for row, spec in enumerate(specs):
        scaled = logits[row].double() / (spec.params.temperature or 1.0)
        threshold = _threshold(scaled, spec.params) if spec.params.temperature else -torch.inf
        assert torch.equal(left[row], torch.where(scaled >= threshold, logits[row], -torch.inf))


class Overlapped:
    """A tiny model on a FakeDevice in an OverlappingEngine, and its reference in a LocalEngine."""

    def __init__(self, model_dir: Path, **sizes: Any) -> None:
        self.reference = NativeRunner(model_dir, num_blocks=NUM_BLOCKS, backend="reference")
        config = read_model_config(model_dir)
        layers = (LayerSpec(config.num_kv_heads, config.head_dim),) * config.num_layers
        self.layout = KVLayout(ModelKV(layers, "float32", "x"), KVGeometry(1, 16, NUM_BLOCKS), 0)
        self.device = FakeDevice()
        self.pool = DevicePool(self.layout, self.device.torch_device)
        weights = Checkpoint(model_dir, tensor_shapes(config), optional_tensors(config))
        decoder = FusedDecoder(
            config, weights, dtype=torch.float32, comm=SingleComm(), pool=self.pool, device=self.device
        )
        self.steps = CudaSteps(decoder, self.device, max_num_seqs=4, num_blocks=NUM_BLOCKS, max_blocks_per_seq=8)
        sizes = {"max_num_batched_tokens": 32, "max_num_seqs": 4, **sizes}
        self.config = EngineConfig(num_blocks=NUM_BLOCKS, vocab_size=VOCAB_SIZE, **sizes)

    def engine(self) -> OverlappingEngine:
        return OverlappingEngine(self.config, self.reference, PrefixHasher(b"x", ""), ManualClock(), self.steps)

    def answers(self, requests: list[GenerateRequest]) -> dict[AttemptId, list[int]]:
        engine = LocalEngine(self.config, self.reference, PrefixHasher(b"x", ""), ManualClock())
        return join_one_by_one(engine, requests)


def asked(name: str, prompt_seed: int, length: int, **params: Any) -> GenerateRequest:
    prompt = tuple(random_prompt(prompt_seed, length))
    settings = {"temperature": 0.0, "ignore_eos": True, **params}
    return GenerateRequest(AttemptId(name), prompt, length, SamplingParams(**settings))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # what padding computes is not defined
def test_an_overlapped_engine_on_graphs_gives_the_references_tokens(tmp_path: Path) -> None:
    """Chunks beside decodes, a shared prefix, draws on the device and on the host, batches of each bucket."""
    parts = Overlapped(make_model(tmp_path, "qwen3", num_hidden_layers=2))
    requests = [
        asked("a", 1, 40, max_tokens=9),
        asked("b", 2, 3, max_tokens=5, temperature=0.8, seed=5),
        asked("c", 1, 37, max_tokens=4, presence_penalty=0.5),
        asked("d", 4, 17, max_tokens=2, temperature=0.9, top_p=0.8, seed=6),
    ]
    parts.steps.capture_all()
    assert parts.device.num_captured == 3  # 1, 2, 4
    assert not parts.pool.flat.any()  # the warm-up wrote nothing
    assert join_one_by_one(parts.engine(), requests) == parts.answers(requests)
    assert parts.steps.num_replays >= 4


def test_a_window_and_a_model_without_qk_norm_agree_with_the_reference(tmp_path: Path) -> None:
    model_dir = make_model(tmp_path, "mistral", num_hidden_layers=1, num_key_value_heads=1)
    edit_config(model_dir, sliding_window=20)
    parts = Overlapped(model_dir)
    requests = [asked("a", 1, 45, max_tokens=3), asked("b", 2, 19, max_tokens=3)]
    assert join_one_by_one(parts.engine(), requests) == parts.answers(requests)
    assert parts.steps.num_replays == 0  # nothing was captured


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # numpy's, in the interpreter
def test_a_row_that_is_not_finite_fails_alone(tmp_path: Path) -> None:
    parts = Overlapped(make_model(tmp_path, "llama", num_hidden_layers=1))
    logprobs = SamplingParams(temperature=0.0, num_logprobs=1)
    for params in (GREEDY, logprobs):  # chosen on the device, and by the host
        parts.pool.layer(0)[5] = float("nan")  # the prefix of `a`
        entries = [entry("a", 16, [5], [5, 6], params), entry("b", 0, [7, 8], [7], params)]
        collected = parts.steps.collect(parts.steps.launch(StepPlan(1, entries)))
        assert collected.failed == ["a"]
        assert collected.sampled[1] is not None
