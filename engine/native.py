"""Runs plans with torch on one rank: model, pool, attention and sampler put together. Implements engine.types.Runner."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from baton.kv_layout import DeviceMemory, KVGeometry, KVLayout, LayerSpec, ModelKV, stored_dtype
from engine.attention.reference import ReferenceAttention
from engine.comm import Comm, SingleComm
from engine.cpu_fast import FastDecoder, Greedy
from engine.kernels.build import KernelsUnavailable
from engine.kv_pool import TORCH_DTYPES, KVPool, MemfdPool
from engine.layers.linear import TorchLinears
from engine.model_config import ModelConfig, ModelUnsupported, check_split, read_model_config
from engine.models.decoder import Decoder, optional_tensors, tensor_shapes
from engine.plan_codec import decode_plan, encode_plan
from engine.progress import MeteredWeights
from engine.sampler import NonFiniteLogits, is_plain_greedy, sample
from engine.types import (
    PENDING,
    BatchEntry,
    Collected,
    Launched,
    OverlappingRunner,
    Sampled,
    StepFailed,
    StepHook,
    StepPlan,
)
from engine.weights import Checkpoint, DummyWeights, WeightSource, fingerprint

if TYPE_CHECKING:
    from engine.cuda.device import Device
    from engine.cuda.steps import CudaSteps

log = logging.getLogger(__name__)

LOAD_FORMATS: Final = ("auto", "dummy")
BACKENDS: Final = ("auto", "reference", "fast")
KV_DTYPES: Final = ("auto", "fp8")
QUANTIZATIONS: Final = (None, "int8", "fp8")


class NativeRunner:
    """One rank of one model replica. Its engine thread calls everything; `kv_buffer` may be used by any thread.

    A failure in the middle of a step ends the whole group: its ranks no longer agree on where they are.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str = "float32",
        comm: Comm | None = None,
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_cache_bytes: int | None = None,
        kv_dtype: str = "auto",
        load_format: str = "auto",
        device: str = "cpu",
        num_threads: int | None = None,
        cores: Sequence[int] = (),
        backend: str = "auto",
        quantization: str | None = None,
        max_num_seqs: int = 256,
        prompt_attention: str = "auto",
        cuda_device: Device | None = None,
    ) -> None:
        """Load this rank's shard and take its pool: `num_blocks` blocks, or as many as fit in `kv_cache_bytes`.

        All ranks of `comm` (default: a single one) give equal arguments; the call is collective. The runner owns
        `comm` from then on. `dtype` is float32 or bfloat16, for weights, activations and KV alike; "auto" is what
        the checkpoint has. `load_format` "dummy" makes weights up. `num_threads` is set for the whole process; the
        threads of the fast backend are pinned to `cores`, if given. `backend`: "fast" is engine.cpu_fast, "reference"
        plain torch, "auto" the first that works here. `quantization` "int8" needs the fast one, "fp8" engine.cuda.

        With `device` "cuda" (or "cuda:N") the pool lies on the GPU and `backend` "fast" or "auto" is engine.cuda, whose decode steps
        of up to `max_num_seqs` sequences are graphs; "reference" is plain torch on the GPU. `kv_dtype` "fp8", which only
        engine.cuda computes, stores KV as e4m3 instead of `dtype`. `cuda_device` (tests) takes the place of torch.cuda.

        `prompt_attention` says who computes prompts without KV before them, on CUDA: "flash", "triton", or "auto", which
        is FlashAttention where it is installed and fits.

        Raises:
            CudaUnavailable: `device` is "cuda", and torch finds none, or there is no triton, or it can not do fp8.
            ModelUnsupported: config.json asks for something that is not computed, or does not split over the ranks.
            WeightsMismatch: the checkpoint does not fit the config.
            KernelsUnavailable: the fast backend was asked for and can not run here.
            ValueError: an argument is out of its range.
        """
        device_here = _device(device, cuda_device, backend, quantization, kv_dtype, prompt_attention)
        if load_format not in LOAD_FORMATS:
            raise ValueError(f"load_format must be one of {LOAD_FORMATS}, not {load_format!r}")
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.config: ModelConfig = read_model_config(model_dir)
        self._comm = comm or SingleComm()
        dtype = self.config.dtype if dtype == "auto" else dtype
        if dtype not in TORCH_DTYPES:
            raise ModelUnsupported(f"dtype must be one of {sorted(TORCH_DTYPES)}, not {dtype!r}")
        if device_here is not None and quantization == "fp8" and dtype not in device_here.fp8_product_dtypes:
            raise ModelUnsupported(f"quantization fp8 goes with dtype bfloat16, not {dtype}: add --dtype bfloat16")
        check_split(self.config, self._comm.size)

        digest = _agreed_fingerprint(self._comm, model_dir, self.config, dtype, load_format)
        spec = LayerSpec(self.config.num_kv_heads, self.config.head_dim)
        if quantization is not None:  # other weights, other KV
            digest = hashlib.blake2b(f"{digest} {quantization}".encode(), digest_size=16).hexdigest()
        model = ModelKV((spec,) * self.config.num_layers, stored_dtype(kv_dtype, dtype), digest)
        self.layout = _sized_layout(model, self._comm, block_size, num_blocks, kv_cache_bytes)
        shapes, optional = tensor_shapes(self.config), optional_tensors(self.config)
        is_dummy = load_format == "dummy"
        where = None if device_here is None else device_here.torch_device
        weights: WeightSource = (
            DummyWeights(shapes, optional, where) if is_dummy else Checkpoint(model_dir, shapes, optional)
        )
        if self._comm.rank == 0:
            weights = MeteredWeights(weights, shapes)
        self._pool: KVPool
        self._fast: FastDecoder | None = None
        self._steps: CudaSteps | None = None
        self._device_memory: DeviceMemory | None = None
        if device_here is None:
            self._load_here(weights, dtype, backend, quantization, num_threads or 1, cores)
        else:
            fp8 = quantization == "fp8"
            self._load_on(device_here, weights, dtype, backend, max_num_seqs, prompt_attention, fp8=fp8)
        self._is_closed = False

    def _load_here(
        self,
        weights: WeightSource,
        dtype: str,
        backend: str,
        quantization: str | None,
        num_threads: int,
        cores: Sequence[int],
    ) -> None:
        """The pool and the model in this machine's memory."""
        self._pool = MemfdPool(self.layout)
        if backend != "reference" or quantization is not None:
            try:
                self._fast = FastDecoder(
                    self.config,
                    weights,
                    dtype=TORCH_DTYPES[dtype],
                    comm=self._comm,
                    pool=self._pool,
                    layout=self.layout,
                    int8=quantization == "int8",
                    num_threads=num_threads,
                    cores=cores or None,
                )
                return
            except KernelsUnavailable as error:
                if backend == "fast" or quantization is not None:
                    raise
                log.warning("no fast CPU kernels; plain torch computes, slower", extra={"reason": str(error)})
        self._load_reference(weights, dtype, None)

    def _load_reference(self, weights: WeightSource, dtype: str, where: torch.device | None) -> None:
        """The model in plain torch, beside the pool; on the CPU if `where` is None."""
        self._decoder = Decoder(
            self.config, weights, dtype=TORCH_DTYPES[dtype], comm=self._comm, linears=TorchLinears(), device=where
        )
        self._attention = ReferenceAttention(self._pool, self.config.windows)

    def _load_on(
        self,
        device: Device,
        weights: WeightSource,
        dtype: str,
        backend: str,
        max_num_seqs: int,
        prompt_attention: str,
        *,
        fp8: bool,
    ) -> None:
        """The pool and the model on a CUDA device."""
        from engine.cuda.decoder import FusedDecoder
        from engine.cuda.flash import PromptShape, choose
        from engine.cuda.pool import DevicePool
        from engine.cuda.steps import CudaSteps

        pool = self._pool = DevicePool(self.layout, device.torch_device)
        self._device_memory = pool.memory()
        if backend == "reference":
            return self._load_reference(weights, dtype, device.torch_device)
        shape = PromptShape(
            num_heads=self.config.num_heads // self._comm.size,
            num_kv_heads=pool.layer(0).shape[2],
            head_dim=self.config.head_dim,
            dtype=TORCH_DTYPES[dtype],
            windows=self.config.windows,
        )
        decoder = FusedDecoder(
            self.config,
            weights,
            dtype=TORCH_DTYPES[dtype],
            comm=self._comm,
            pool=pool,
            device=device,
            fp8=fp8,
            prompt_attention=choose(prompt_attention, shape, pool.layer(0).dtype, device.torch_device),
        )
        geometry = self.layout.geometry
        max_blocks = min(-(-self.config.max_position_embeddings // geometry.block_size), geometry.num_blocks)
        self._steps = CudaSteps(
            decoder,
            device,
            max_num_seqs=max_num_seqs,
            num_blocks=geometry.num_blocks,
            max_blocks_per_seq=max_blocks,
            is_leader=self._comm.rank == 0,
        )
        self._steps.capture_all()

    @property
    def overlapping(self) -> OverlappingRunner | None:
        """This runner as one whose steps overlap, where they can."""
        return self if self._steps is not None and self._comm.size == 1 else None

    def launch(self, plan: StepPlan, hook: StepHook | None = None) -> Launched:
        """See OverlappingRunner; only where `overlapping` is not None.

        Raises:
            ValueError: the plan can not be run on this pool and model; nothing was computed.
        """
        assert self._steps is not None
        self._check(plan, lowest_token=PENDING)
        return self._steps.launch(plan, hook)

    def collect(self, launched: Launched) -> Collected:
        """See OverlappingRunner."""
        assert self._steps is not None
        return self._steps.collect(launched)

    def kv_buffer(self) -> memoryview | DeviceMemory:
        """See Runner."""
        return self._device_memory or self._pool.buffer()

    def kv_fd(self) -> int | None:
        """See Runner."""
        return self._pool.fd()

    def run(self, plan: StepPlan, hook: StepHook | None = None) -> list[Sampled | None]:
        """See Runner. Collective: every rank runs the same plans in the same order.

        Raises:
            ValueError: the plan can not be run on this pool and model; nothing was computed.
            StepFailed: leader: logits are not finite; no token was chosen.
            PeerLost: another rank is gone.
        """
        if not plan.entries:
            return []
        self._check(plan)
        if self._steps is not None:
            return self._run_steps(self._steps, plan, hook)
        try:
            logits = self._compute(plan, hook) if self._fast is None else self._compute_fast(self._fast, plan, hook)
        except BaseException:
            self._comm.close()  # in the middle of a step: the other ranks must not wait for this one
            raise
        return self._sampled(plan, logits)

    def run_all(self, plan: StepPlan, hook: StepHook | None = None) -> list[Sampled | None]:
        """Leader: `run` here and on every follower, all of which are in `follow`. Raises as `run` does."""
        self._check(plan)
        self._comm.send(encode_plan(plan, for_followers=True))
        return self.run(plan, hook)

    def follow(self, hook: StepHook | None = None) -> None:
        """Follower: run the plans of the leader's `run_all` until it closes. Idle waiting costs no CPU.

        Raises:
            PeerLost: the leader, or another follower, died.
        """
        while (message := self._comm.receive()) is not None:
            self.run(decode_plan(message), hook)

    def close(self) -> None:
        """See Runner. On the leader this ends every follower's `follow`."""
        if not self._is_closed:
            self._is_closed = True
            self._comm.close()
            if self._steps is not None:
                self._steps.close()
                self._steps = None
            elif self._fast is None:
                del self._decoder, self._attention  # they hold views of the pool
            else:
                self._fast.close()
            self._pool.close()

    def _check(self, plan: StepPlan, lowest_token: int = 0) -> None:
        """A plan that breaks one of these would read or write outside its blocks, or outside of the model."""
        block_size, num_blocks = self.layout.geometry.block_size, self.layout.geometry.num_blocks
        for entry in plan.entries:
            end, table = entry.start + len(entry.token_ids), entry.block_table
            problem = ""
            if not entry.token_ids or entry.start < 0:
                problem = "has no tokens"
            elif end > self.config.max_position_embeddings:
                problem = f"goes to token {end}; the model ends at {self.config.max_position_embeddings}"
            elif end > len(table) * block_size:
                problem = f"needs {end} tokens of KV; its block table holds {len(table) * block_size}"
            elif self._steps is None and (min(table) < 0 or max(table) >= num_blocks):  # CudaSteps looks itself
                problem = f"names a block outside of 0..{num_blocks - 1}"
            elif min(entry.token_ids) < lowest_token or max(entry.token_ids) >= self.config.vocab_size:
                problem = f"has a token outside of the vocabulary of {self.config.vocab_size}"
            if problem:
                raise ValueError(f"step {plan.step_id}: {entry.attempt_id} {problem}")

    def _run_steps(self, steps: CudaSteps, plan: StepPlan, hook: StepHook | None) -> list[Sampled | None]:
        """One step, and nothing beside it."""
        try:
            collected = steps.collect(steps.launch(plan, hook))
        except BaseException:
            self._comm.close()
            raise
        if collected.failed:
            raise StepFailed(f"step {plan.step_id}: logits of {collected.failed} are not finite", collected.failed)
        return collected.sampled

    @torch.inference_mode()
    def _compute(self, plan: StepPlan, hook: StepHook | None) -> Tensor | None:
        """Logits of the rows that sample, on the leader."""
        assert not self._is_closed
        token_ids, positions, rows = (tensor.to(self._pool.layer(0).device) for tensor in _flatten(plan.entries))
        if hook is not None:
            hook.step_begin(plan)
        self._attention.begin_step(plan.entries)

        def written(layer: int) -> None:
            if hook is not None:
                if self._device_memory is not None:
                    torch.cuda.synchronize()
                hook.layer_done(layer, None)

        logits = self._decoder.forward(token_ids, positions, rows, self._attention, written)
        if hook is not None:
            hook.step_done()
        return logits

    def _compute_fast(self, fast: FastDecoder, plan: StepPlan, hook: StepHook | None) -> Tensor | Greedy | None:
        """As `_compute`; only the best logits where no sequence needs more."""
        assert not self._is_closed
        if hook is not None:
            hook.step_begin(plan)
        written = None if hook is None else (lambda layer: hook.layer_done(layer, None))
        # A follower's plan says nothing of how to sample, so all ranks go by what is known to all.
        is_greedy = self._comm.size == 1 and all(
            entry.sample is None or is_plain_greedy(entry.sample) for entry in plan.entries
        )
        with torch.inference_mode():
            result = fast.greedy(plan.entries, written) if is_greedy else fast.logits(plan.entries, written)
        if hook is not None:
            hook.step_done()
        return result

    @torch.inference_mode()
    def _sampled(self, plan: StepPlan, logits: Tensor | Greedy | None) -> list[Sampled | None]:
        specs = [entry.sample for entry in plan.entries if entry.sample is not None]
        if logits is None:
            return [None] * len(plan.entries)
        try:
            chosen = iter(_chosen(logits) if isinstance(logits, Greedy) else sample(logits, specs))
        except NonFiniteLogits as error:
            names = [entry.attempt_id for entry in plan.entries if entry.sample is not None]
            broken = [names[row] for row in error.rows]
            raise StepFailed(f"step {plan.step_id}: logits of {broken} are not finite", broken) from error
        return [None if entry.sample is None else next(chosen) for entry in plan.entries]


def _chosen(best: Greedy) -> list[Sampled]:
    """The tokens of a greedy step. Raises NonFiniteLogits, naming the rows."""
    finite = np.isfinite(best.logits)
    if not finite.all():
        raise NonFiniteLogits(np.flatnonzero(~finite).tolist())
    return [Sampled(token) for token in best.token_ids.tolist()]


def _flatten(entries: Sequence[BatchEntry]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and positions [num_tokens], and the rows of the last token of each entry that samples."""
    tokens: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    for entry in entries:
        tokens += entry.token_ids
        positions += range(entry.start, entry.start + len(entry.token_ids))
        if entry.sample is not None:
            rows.append(len(tokens) - 1)
    return tuple(torch.tensor(values, dtype=torch.int64) for values in (tokens, positions, rows))  # type: ignore[return-value]


def _device(
    name: str,
    given: Device | None,
    backend: str,
    quantization: str | None,
    kv_dtype: str,
    prompt_attention: str,
) -> Device | None:
    """Where a runner computes, `given` or what `name` says; None: on the CPU.

    Raises:
        ValueError: an argument is out of its range, or does not go with the device.
        CudaUnavailable: as NativeRunner says.
    """
    for what, value, possible in (
        ("backend", backend, BACKENDS),
        ("quantization", quantization, QUANTIZATIONS),
        ("kv_dtype", kv_dtype, KV_DTYPES),
    ):
        if value not in possible:
            raise ValueError(f"{what} must be one of {possible}, not {value!r}")
    kind, _, ordinal = name.partition(":")
    if kind not in ("cpu", "cuda") or not (ordinal or "0").isdecimal():
        raise ValueError(f"device must be cpu, cuda or cuda:N, not {name!r}")
    is_cuda, is_fp8 = kind == "cuda" or given is not None, "fp8" in (kv_dtype, quantization)
    if quantization == "int8" and is_cuda:
        raise ValueError("quantization int8 is computed on the CPU only, not on cuda")
    if is_fp8 and (not is_cuda or backend == "reference"):
        what = "kv_dtype" if kv_dtype == "fp8" else "quantization"
        raise ValueError(f"{what} fp8 is computed by the CUDA kernels only, not on the CPU")
    if kind == "cuda":
        from engine.cuda.device import CudaDevice

        given = given or CudaDevice(int(ordinal or 0))
    if prompt_attention != "auto" and (given is None or backend == "reference"):
        raise ValueError(f"prompt_attention {prompt_attention} needs device cuda and its kernels")
    if given is not None and is_fp8:
        given.check_fp8()
    return given


def _agreed_fingerprint(comm: Comm, model_dir: str | Path, config: ModelConfig, dtype: str, load_format: str) -> str:
    """The leader's fingerprint on all ranks: it reads every byte of the weights, so only one rank should."""
    if comm.rank == 0:
        digest = fingerprint(model_dir, config, dtype, load_format)
        comm.send(digest.encode())
        return digest
    message = comm.receive()
    if message is None:
        raise RuntimeError("the leader closed before it said which model it has")
    return message.decode()


def _sized_layout(
    model: ModelKV, comm: Comm, block_size: int, num_blocks: int | None, kv_cache_bytes: int | None
) -> KVLayout:
    if (num_blocks is None) == (kv_cache_bytes is None):
        raise ValueError("give one of num_blocks and kv_cache_bytes")
    if num_blocks is None:
        assert kv_cache_bytes is not None
        one_block = KVLayout(model, KVGeometry(comm.size, block_size, 1), comm.rank).bytes_per_block
        num_blocks = kv_cache_bytes // one_block
    if num_blocks < 1:
        raise ValueError(f"the KV pool holds no block: num_blocks {num_blocks}, kv_cache_bytes {kv_cache_bytes}")
    return KVLayout(model, KVGeometry(comm.size, block_size, num_blocks), comm.rank)
