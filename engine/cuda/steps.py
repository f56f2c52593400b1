"""Runs plans on a device, one step ahead of the host: packs, replays or computes, samples, reads. OverlappingRunner.

A step in which every sequence decodes and the device can choose every token is one replay of a CUDA graph: embedding
to sampling, with the tokens that the step before it chose. Everything else (prompt chunks, mixed batches, tokens that
the host has to choose) is computed outside of a graph, with the same kernels.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from baton.request import AttemptId
from engine.cuda.buckets import bucket_for, buckets
from engine.cuda.cuts import cut
from engine.cuda.decoder import FreshPrompts, FusedDecoder, Step
from engine.cuda.device import Device, Event, Graph
from engine.cuda.inputs import InputBuffer, Shape, Tables
from engine.cuda.kernels.sampling import choose_tokens
from engine.sampler import sample
from engine.types import PENDING, BatchEntry, Collected, Launched, Sampled, SampleSpec, StepHook, StepPlan

_NUM_RESULTS: Final = 3  # two steps under way and one that is being read
_DECODE, _CHUNK, _FRESH = range(3)  # kinds of entries, in the order in which a step has them


def is_chosen_on_device(spec: SampleSpec) -> bool:
    """Greedy, or a draw, cut or not. Penalties, biases, bans and logprobs are the host's."""
    params = spec.params
    return (
        params.num_logprobs is None
        and not spec.banned_token_ids
        and not params.logit_bias
        and (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)
    )


def _kind(entry: BatchEntry) -> int:
    """One token, a prompt chunk behind KV, or one from the first token on."""
    return _DECODE if len(entry.token_ids) == 1 else _CHUNK if entry.start else _FRESH


def is_cut(spec: SampleSpec) -> bool:
    """Does min_p, top_k or top_p exclude tokens? Such a step runs without a graph, because it sorts."""
    params = spec.params
    return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)


@dataclass(slots=True)
class _UnderWay:
    launched: Launched
    order: Sequence[int]
    """Indices of the plan's entries, as they were computed."""
    done: Event
    results: Tensor | None
    """[2, max_num_seqs] int32 on the host: tokens, and the highest logits as they are; None: the host samples."""
    logits: list[Tensor | None]
    """[num_rows, vocab] where the host samples; filled when the step is queued."""


class CudaSteps:
    """One rank's model, pool and graphs on one device. Engine thread only.

    With several ranks the leader's plans carry every token, so steps do not overlap and nothing is fed.
    """

    def __init__(
        self,
        decoder: FusedDecoder,
        device: Device,
        *,
        max_num_seqs: int,
        num_blocks: int,
        max_blocks_per_seq: int,
        is_leader: bool = True,
    ) -> None:
        """`max_num_seqs` is the largest decode step that gets a graph; larger ones run without."""
        self._decoder, self._device = decoder, device
        self._is_leader = is_leader
        self._tables = Tables(max_num_seqs, num_blocks)
        decodes = Shape(max_num_seqs, max_num_seqs, max_num_seqs)
        self._decode_inputs = InputBuffer(device, decodes, max_num_seqs * max_blocks_per_seq)
        self._mixed_inputs = InputBuffer(device, Shape(1, 1, 1, 1), 1)
        self._graphs: dict[int, Graph] = {}
        self._graph_sizes: tuple[int, ...] = ()
        self._chosen = torch.zeros(max_num_seqs, dtype=torch.int32, device=device.torch_device)
        self._highest = torch.zeros(max_num_seqs, dtype=torch.float32, device=device.torch_device)
        self._results = deque(device.host_ints(2 * max_num_seqs).view(2, -1) for _ in range(_NUM_RESULTS))
        self._row_of: dict[AttemptId, int] = {}
        self._under_way: deque[_UnderWay] = deque()
        self.num_replays = 0

    def capture_all(self) -> None:
        """Compile every kernel, and capture a graph for each bucket, the largest first: they share memory.

        Blocks for seconds; no step is under way. Until then every step is computed without a graph, and the first one
        of each kind waits for the compiler.
        """
        assert not self._under_way, "this runs steps of padding, which overwrite what the last step chose"
        chunk = Shape(num_tokens=2, num_seqs=1, num_rows=1, num_tiles=1)
        inputs = InputBuffer(self._device, chunk, 1)
        inputs.clear()
        prompts = [Step(inputs.tensors(chunk), 0, samples_all=False)]
        if self._decoder.takes_fresh_prompts:
            whole = inputs.tensors(Shape(num_tokens=2, num_seqs=1, num_rows=1))
            prompts.append(Step(whole, 0, samples_all=False, fresh=FreshPrompts(1, 2, 2)))
        for prompt in prompts:
            self._device.run(functools.partial(self._step, prompt, _nothing))
        sizes = buckets(len(self._chosen))
        for size in reversed(sizes):
            step = Step(self._decode_inputs.tensors(Shape(size, size, size)), size, samples_all=True)
            self._decode_inputs.clear()
            self._graphs[size] = self._device.capture(functools.partial(self._step, step, _nothing))
        self._graph_sizes = sizes

    def launch(self, plan: StepPlan, hook: StepHook | None = None) -> Launched:
        """See OverlappingRunner."""
        order = sorted(range(len(plan.entries)), key=lambda index: _kind(plan.entries[index]))
        entries = [plan.entries[index] for index in order]
        specs = [entry.sample for entry in entries if entry.sample is not None]
        is_fed = (
            self._is_leader and len(specs) <= len(self._chosen) and all(is_chosen_on_device(spec) for spec in specs)
        )
        sources = [self._row_of.get(entry.attempt_id, -1) for entry in entries]
        for entry, source in zip(entries, sources, strict=True):
            if source < 0 and PENDING in entry.token_ids:
                raise ValueError(f"{entry.attempt_id} has a token that the last step did not choose")
        if hook is not None:
            hook.step_begin(plan)
        logits: list[Tensor | None] = []
        size = bucket_for(len(entries), self._graph_sizes)
        num_table_ints = sum(len(entry.block_table) for entry in entries)
        has_cuts = is_fed and any(is_cut(spec) for spec in specs)
        is_decode = not has_cuts and len(specs) == plan.num_tokens == len(entries) and (is_fed or not self._is_leader)
        if size is not None and is_decode and num_table_ints <= self._decode_inputs.num_table_ints:
            self._replay(entries, size, sources, hook)
        else:
            self._compute(entries, len(specs), sources, hook, is_fed, logits, has_cuts=has_cuts)
        if hook is not None:
            hook.step_done()
        results = self._read_later(len(specs)) if is_fed and specs else None
        launched = Launched(plan, is_fed)
        names = [entry.attempt_id for entry in entries if entry.sample is not None]
        self._row_of = {name: row for row, name in enumerate(names)} if is_fed else {}
        self._under_way.append(_UnderWay(launched, order, self._device.record(), results, logits))
        return launched

    def collect(self, launched: Launched) -> Collected:
        """See OverlappingRunner."""
        step = self._under_way.popleft()
        assert step.launched is launched, "steps are collected in the order of their launches"
        step.done.wait()
        entries = [launched.plan.entries[index] for index in step.order]
        sampling = [entry for entry in entries if entry.sample is not None]
        if step.results is not None:
            chosen, failed = _read(step.results, sampling)
            self._results.append(step.results)
        elif step.logits and (logits := step.logits[0]) is not None:
            chosen, failed = self._sampled(logits, sampling)
        else:  # a follower, or nothing to sample
            return Collected([None] * len(entries))
        tokens = iter(chosen)
        in_order: list[Sampled | None] = [None] * len(entries)
        for index, entry in zip(step.order, entries, strict=True):
            in_order[index] = None if entry.sample is None else next(tokens)
        return Collected(in_order, failed)

    def close(self) -> None:
        """Drop graphs and wait for what is under way."""
        self._device.record().wait()
        self._graphs.clear()
        self._under_way.clear()

    def _replay(self, entries: Sequence[BatchEntry], size: int, sources: Sequence[int], hook: StepHook | None) -> None:
        self._decode_inputs.load(entries, Shape(size, size, size), self._tables, sources)
        self._graphs[size].replay()
        self.num_replays += 1
        if hook is not None:
            ready = self._device.record()
            for layer in range(self._decoder.num_layers):
                hook.layer_done(layer, ready)

    def _step(self, step: Step, kv_written: Callable[[int], None], *, has_cuts: bool = False) -> None:
        """Queue a step whose tokens the device chooses."""
        with torch.inference_mode():
            logits = self._decoder.compute(step, self._chosen, kv_written)
            if logits is not None:
                rows = len(logits)
                given = step.tensors
                if has_cuts:
                    logits = cut(logits, given.temperatures, given.log_min_p, given.top_p, given.top_k)
                choose_tokens(logits, given.keys, given.temperatures, self._chosen[:rows], self._highest[:rows])

    def _compute(
        self,
        entries: Sequence[BatchEntry],
        num_rows: int,
        sources: Sequence[int],
        hook: StepHook | None,
        is_fed: bool,
        logits: list[Tensor | None],
        *,
        has_cuts: bool,
    ) -> None:
        """Queue a step of any kind, without a graph. Where the host samples, `logits` gets what it samples from."""
        num_decodes = sum(len(entry.token_ids) == 1 for entry in entries)
        num_tokens = sum(len(entry.token_ids) for entry in entries)
        fresh = self._fresh(entries)
        num_paged = len(entries) - (0 if fresh is None else fresh.num_seqs)
        each = self._decoder.tokens_per_tile()
        tiles = [
            (seq, begin)
            for seq, entry in enumerate(entries[num_decodes:num_paged], num_decodes)
            for begin in range(0, len(entry.token_ids), each)
        ]
        shape = Shape(num_tokens, len(entries), num_rows, len(tiles))
        inputs = self._inputs_for(shape, sum(len(entry.block_table) for entry in entries))
        inputs.load(entries, shape, self._tables, sources, tiles)
        step = Step(inputs.tensors(shape), num_decodes, samples_all=num_rows == num_tokens, fresh=fresh)

        def kv_written(layer: int) -> None:
            if hook is not None:
                hook.layer_done(layer, self._device.record())

        def work() -> None:
            if is_fed:
                self._step(step, kv_written, has_cuts=has_cuts)
            else:
                with torch.inference_mode():
                    logits.append(self._decoder.compute(step, self._chosen, kv_written))

        self._device.run(work)

    def _fresh(self, entries: Sequence[BatchEntry]) -> FreshPrompts | None:
        lengths = [len(entry.token_ids) for entry in entries if _kind(entry) == _FRESH]
        if not lengths or not self._decoder.takes_fresh_prompts:
            return None
        return FreshPrompts(len(lengths), sum(lengths), max(lengths))

    def _inputs_for(self, shape: Shape, num_table_ints: int) -> InputBuffer:
        """A buffer that is large enough; making one waits for the device."""
        have = self._mixed_inputs
        wanted = (shape.num_tokens, shape.num_seqs, shape.num_rows, shape.num_tiles, num_table_ints)
        capacity = have.capacity
        held = (capacity.num_tokens, capacity.num_seqs, capacity.num_rows, capacity.num_tiles, have.num_table_ints)
        if any(want > hold for want, hold in zip(wanted, held, strict=True)):
            self._device.record().wait()
            sizes = [max(1 << max(0, want - 1).bit_length(), hold) for want, hold in zip(wanted, held, strict=True)]
            self._mixed_inputs = InputBuffer(self._device, Shape(*sizes[:4]), sizes[4])
        return self._mixed_inputs

    def _read_later(self, num_rows: int) -> Tensor:
        """Queue the copy of the chosen tokens to the host."""
        results = self._results.popleft()
        self._device.copy(self._chosen[:num_rows], results[0, :num_rows])
        self._device.copy(self._highest[:num_rows], results[1, :num_rows].view(torch.float32))
        return results

    def _sampled(self, logits: Tensor, entries: Sequence[BatchEntry]) -> tuple[list[Sampled], list[AttemptId]]:
        """Tokens that the host chooses; rows that are not finite get one that nobody reads."""
        found: list[tuple[list[Sampled], list[AttemptId]]] = []

        def work() -> None:
            with torch.inference_mode():
                wide = logits.float()
                finite = torch.isfinite(wide.max(dim=-1).values).tolist()
                wide = torch.where(torch.tensor(finite, device=wide.device)[:, None], wide, 0)
                specs = [entry.sample for entry in entries if entry.sample is not None]
                failed = [entry.attempt_id for entry, is_finite in zip(entries, finite, strict=True) if not is_finite]
                found.append((sample(wide, specs), failed))

        self._device.run(work)
        self._device.record().wait()
        return found[0]


def _nothing(layer: int) -> None:
    """Nobody waits for a layer."""


def _read(results: Tensor, entries: Sequence[BatchEntry]) -> tuple[list[Sampled], list[AttemptId]]:
    tokens = results[0, : len(entries)].tolist()
    finite = np.isfinite(results[1, : len(entries)].numpy().view(np.float32)).tolist()
    failed = [entry.attempt_id for entry, is_finite in zip(entries, finite, strict=True) if not is_finite]
    return [Sampled(token) for token in tokens], failed
