"""The CUDA driver without a device: the digest, the kernels on the host, the calls of libcuda, and how the fake judges."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.cuda import libcuda
from kvtransfer.cuda.driver import HANDLE_BYTES, CudaDriver, CudaError, reference_digest, table
from kvtransfer.cuda.libcuda import LibCuda
from kvtransfer.pool import Pieces
from kvtransfer.transports.cuda_ipc import check_device
from tests.support.cuda_stub import KERNELS, build_stub
from tests.support.fake_cuda import FakeCuda

CUDA_H = next(iter(sorted(Path("/usr/local").glob("cuda*/include/cuda.h"))), None)


def random_bytes(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


# The digest.


def test_the_digest_of_known_bytes_is_what_it_was() -> None:
    """A change of the formula is a change of the format: both ends of a link must make it alike."""
    assert reference_digest(bytes(range(48))).hex() == "516cf8801efa1f554dc249f9b264b6d2"


def test_every_single_bit_counts() -> None:
    data = random_bytes(256)
    seen = {reference_digest(data)}
    for bit in range(8 * len(data)):
        changed = data.copy()
        changed[bit // 8] ^= 1 << bit % 8
        seen.add(reference_digest(changed))
    assert len(seen) == 8 * len(data) + 1


@pytest.mark.parametrize("fill", ["random", "zeros", "few values"])
def test_units_that_change_places_are_noticed(fill: str) -> None:
    rng = np.random.default_rng(1)
    data = {
        "random": random_bytes(4096),
        "zeros": np.where(np.arange(4096) < 16, 1, 0).astype(np.uint8),
        "few values": rng.integers(0, 2, 4096, np.uint8),
    }[fill].reshape(-1, 16)
    right = reference_digest(data)
    for _ in range(300):
        one, other = rng.integers(0, len(data), 2)
        if not (data[one] == data[other]).all():
            swapped = data.copy()
            swapped[[one, other]] = swapped[[other, one]]
            assert reference_digest(swapped) != right


def test_more_or_fewer_units_are_noticed_even_of_zeros() -> None:
    digests = {reference_digest(bytes(16 * count)) for count in range(1, 200)}
    assert len(digests) == 199


def test_each_quarter_of_the_digest_spreads_as_chance_would_over_inputs_that_hardly_differ() -> None:
    """20,000 inputs of zeros but for one or two small numbers: equal 32-bit quarters as often as with random ones."""
    rng = np.random.default_rng(2)
    inputs = {(tuple(rng.integers(0, 8, 2)), tuple(rng.integers(1, 64, 2))) for _ in range(20_000)}
    data = np.zeros((8, 2), np.uint64)
    quarters = np.zeros((len(inputs), 4), np.uint32)
    for row, (places, values) in enumerate(sorted(inputs)):
        data[:] = 0
        data[places, (0, 1)] = values
        quarters[row] = np.frombuffer(reference_digest(data.tobytes()), "<u4")
    expected = len(inputs) ** 2 / 2**33
    for quarter in quarters.T:
        assert len(inputs) - len(np.unique(quarter)) < expected + 20


# Lists of pieces.


def pieces_over(start: int, lengths: list[int], gap: int = 16) -> Pieces:
    """Pieces of so many units, with gaps."""
    rows = []
    for length in lengths:
        rows.append((start, 16 * length))
        start += 16 * length + gap
    return np.array(rows, np.uint64)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_every_byte_has_its_place_in_the_table_once(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    other = np.diff(np.unique([0, sum(lengths), *rng.integers(0, sum(lengths) + 1, 5)])).tolist()
    to, fro = pieces_over(4096, lengths), pieces_over(2**30, other, gap=160)
    rows = table(to, fro)
    ends = [*rows[1:, 2].tolist(), sum(lengths)]
    moved = [
        (to_at + 16 * unit, from_at + 16 * unit)
        for (to_at, from_at, first), end in zip(rows.tolist(), ends, strict=True)
        for unit in range(end - first)
    ]
    expected_to = [start + 16 * unit for start, length in to.tolist() for unit in range(length // 16)]
    expected_from = [start + 16 * unit for start, length in fro.tolist() for unit in range(length // 16)]
    assert moved == list(zip(expected_to, expected_from, strict=True))


def test_pieces_that_do_not_fit_together_are_an_error() -> None:
    with pytest.raises(ValueError, match="different numbers"):
        table(pieces_over(4096, [2]), pieces_over(4096, [3]))
    with pytest.raises(ValueError, match="aligned"):
        table(np.array([[4096, 24]], np.uint64), None)
    with pytest.raises(ValueError, match="aligned"):
        table(np.array([[4100, 16]], np.uint64), None)


# libcuda, over one whose device is this process's memory and which runs the kernels by threads.


@pytest.fixture(scope="module", params=["own declarations", "NVIDIA's declarations"])
def stub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    if request.param == "own declarations":
        return build_stub(tmp_path_factory.mktemp("cuda"))
    if CUDA_H is None:
        pytest.skip("there is no cuda.h")
    return build_stub(tmp_path_factory.mktemp("cuda"), "-DWITH_CUDA_H", "-isystem", str(CUDA_H.parent))


@pytest.fixture
def driver(stub: str) -> Iterator[LibCuda]:
    made = LibCuda(0, libcuda=stub, image=b"stub")
    yield made
    made.close()
    made.close()
    assert ctypes.CDLL(stub).stub_num_allocations() == 0


def test_the_kernels_do_what_the_reference_does(driver: LibCuda) -> None:
    check_device(driver)


def test_a_job_is_seen_to_be_done_only_when_the_event_says_so(driver: LibCuda) -> None:
    start = driver.allocate(1024)
    data = random_bytes(1024).tobytes()
    driver.write(start, data)
    job = driver.begin(np.array([[start, 1024]], np.uint64), 1024, None)
    assert not job.is_done()
    assert job.is_done()
    assert job.is_done()
    assert job.digest == reference_digest(data)
    driver.free(start)


def test_many_small_pieces_outgrow_a_slot_and_are_right(driver: LibCuda) -> None:
    num_units = 3000
    start = driver.allocate(3 * 16 * num_units)
    data = random_bytes(16 * num_units)
    driver.write(start, data.tobytes())
    fro = np.array([[start + 16 * unit, 16] for unit in range(num_units)][::-1], np.uint64)
    to = pieces_over(start + 16 * num_units, [1] * num_units)
    job = driver.begin(to, 16 * num_units, fro)
    driver.finish()
    assert job.is_done()
    moved = data.reshape(-1, 16)[::-1]
    assert job.digest == reference_digest(np.ascontiguousarray(moved))
    there = np.frombuffer(driver.read(start + 16 * num_units, 2 * 16 * num_units), np.uint8).reshape(-1, 2, 16)
    assert (there[:, 0] == moved).all()
    driver.free(start)


def test_handles_and_devices_are_told_as_nvidia_says(driver: LibCuda) -> None:
    start = driver.allocate(4096)
    handle = driver.export(start)
    assert len(handle) == HANDLE_BYTES
    assert driver.open(handle) == start
    driver.close_handle(start)
    assert driver.range_of(start + 100) == (start, 4096)
    assert driver.uuid == b"a" * 16
    assert driver.readable() == {b"a" * 16, b"b" * 16}
    with pytest.raises(CudaError, match="64 bytes"):
        driver.open(handle[:-1])
    with pytest.raises(CudaError, match="cuIpcOpenMemHandle_v2: CUDA_ERROR"):
        driver.open(bytes(64))
    with pytest.raises(CudaError, match="cuMemFree_v2: CUDA_ERROR_INVALID_VALUE"):
        driver.free(1)
    driver.free(start)


def test_without_a_driver_or_a_device_the_error_says_so(stub: str) -> None:
    with pytest.raises(CudaError, match="NVIDIA's driver is not there"):
        LibCuda(0, libcuda="libcuda-that-is-not-there.so")
    with pytest.raises(CudaError, match="cuDeviceGet: CUDA_ERROR_INVALID_VALUE"):
        LibCuda(7, libcuda=stub, image=b"stub")
    with pytest.raises(CudaError, match="cuModuleLoadData"):
        LibCuda(0, libcuda=stub, image=b"no kernels")


def test_without_the_compiler_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libcuda, "_NVRTC_NAMES", ("libnvrtc-that-is-not-there.so",))
    with pytest.raises(CudaError, match="NVRTC is missing"):
        libcuda.compiled("sm_90")


def test_nvrtc_compiles_the_kernels() -> None:
    try:
        image = libcuda.compiled("sm_90")
    except CudaError as error:
        if "NVRTC is missing" in str(error):
            pytest.skip(str(error))
        raise
    assert image.startswith(b"\x7fELF")
    assert b"baton_copy" in image
    assert b"baton_digest" in image


def test_nvcc_compiles_the_kernels(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("there is no nvcc")
    out = tmp_path / "kernels.cubin"
    subprocess.run(
        [nvcc, "-arch=sm_90", "-cubin", "-Werror", "all-warnings", "-o", out, KERNELS], check=True, timeout=50
    )
    assert b"baton_digest" in out.read_bytes()


# The self-test and the fake.


@pytest.fixture
def fakes() -> Iterator[list[FakeCuda]]:
    made = [FakeCuda(), FakeCuda()]
    yield made
    for fake in made:
        fake.end_process()
    FakeCuda.violations.clear()


def test_a_device_that_does_not_copy_or_digests_something_else_is_refused(fakes: list[FakeCuda]) -> None:
    fake: CudaDriver = fakes[0]
    check_device(fake)
    fakes[0].breaks_digests = True
    with pytest.raises(CudaError, match="digest is not the reference's"):
        check_device(fake)
    fakes[0].breaks_digests, fakes[0].breaks_copies = False, True
    with pytest.raises(CudaError, match="does not copy"):
        check_device(fake)
    assert FakeCuda.violations == []


def test_the_fake_notices_work_outside_of_an_allocation_and_on_what_is_unmapped(fakes: list[FakeCuda]) -> None:
    ours, theirs = fakes
    start = theirs.allocate(4096)
    mapped = ours.open(theirs.export(start))
    target = ours.allocate(4096)
    to = np.array([[target, 64]], np.uint64)
    for source in (mapped + 4096 - 32, mapped + 2**21, start):
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            ours.begin(to, 64, np.array([[source, 64]], np.uint64))
    ours.close_handle(mapped)
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        ours.begin(to, 64, np.array([[mapped, 64]], np.uint64))
    assert len(FakeCuda.violations) == 4


def test_the_fake_notices_a_mapping_that_is_closed_under_a_copy(fakes: list[FakeCuda]) -> None:
    ours, theirs = fakes
    mapped = ours.open(theirs.export(theirs.allocate(4096)))
    assert ours.open(theirs.export(next(iter(theirs._memory)))) == mapped
    to = np.array([[ours.allocate(4096), 64]], np.uint64)
    ours.is_held = True
    ours.begin(to, 64, np.array([[mapped, 64]], np.uint64))
    ours.close_handle(mapped)
    assert FakeCuda.violations == []
    ours.close_handle(mapped)
    assert FakeCuda.violations == ["a mapping was closed while work on it was under way"]


def test_the_fake_notices_a_read_of_what_the_engine_has_not_written(fakes: list[FakeCuda]) -> None:
    ours, theirs = fakes
    start = theirs.allocate(4096)
    mapped = ours.open(theirs.export(start))
    event = theirs.write_later(start + 64, b"x" * 64)
    to = np.array([[ours.allocate(4096), 64]], np.uint64)
    ours.begin(to, 64, np.array([[mapped, 64]], np.uint64))
    assert FakeCuda.violations == []
    assert not event.query()
    ours.begin(to, 64, np.array([[mapped + 112, 64]], np.uint64))
    assert FakeCuda.violations == ["bytes were read before the engine had written them"]
    event.fire()
    assert event.query()
    job = ours.begin(to, 64, np.array([[mapped + 64, 64]], np.uint64))
    ours.finish()
    assert job.is_done()
    assert job.digest == reference_digest(b"x" * 64)
    assert len(FakeCuda.violations) == 1


def test_the_fake_does_not_open_what_it_has_exported_itself(fakes: list[FakeCuda]) -> None:
    handle = fakes[0].export(fakes[0].allocate(4096))
    with pytest.raises(CudaError, match="INVALID_CONTEXT"):
        fakes[0].open(handle)
