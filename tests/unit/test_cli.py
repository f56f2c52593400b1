"""The command line: every flag sets its key, defaults stand elsewhere, and help is quick."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from baton.config import Config, ConfigError, load_config
from cluster import cli, status

_ROOT = Path(__file__).resolve().parent.parent.parent
_VALUES: dict[str, tuple[str, Any]] = {
    "topology.prefill": ("3", 3),
    "topology.decode": ("4", 4),
    "topology.mixed": ("2", 2),
    "topology.tp": ("2", 2),
    "topology.prefill_tp": ("8", 8),
    "model.dtype": ("bfloat16", "bfloat16"),
    "model.quantization": ("int8", "int8"),
    "model.max_model_len": ("512", 512),
    "model.served_model_name": ("1e3", "1e3"),
    "engine.kv_cache_bytes": ("1048576", 1048576),
    "engine.kind": ("sim", "sim"),
    "engine.device": ("cpu", "cpu"),
    "cluster.launcher": ("ray", "ray"),
    "cluster.address": ("auto", "auto"),
    "router.host": ("0.0.0.0", "0.0.0.0"),
    "router.port": ("0", 0),
    "router.grpc_port": ("1234", 1234),
    "router.api_key_file": ("no", "no"),
    "log_level": ("debug", "debug"),
}


def configure(*arguments: str) -> Config:
    return load_config(settings=cli.settings_of(cli.parser().parse_args(["serve", *arguments])))


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("flag", [flag for flag in cli.FLAGS if flag.key in _VALUES], ids=lambda flag: flag.name)
def test_a_flag_sets_its_key(flag: cli.Flag) -> None:
    text, value = _VALUES[flag.key]
    assert value_of(configure(flag.name, text), flag.key) == value


def test_encrypt_is_a_flag_without_a_value() -> None:
    assert configure("--encrypt", "some-model-dir").is_encrypted
    assert not configure().is_encrypted


def test_nixl_is_a_transport_that_can_not_be_encrypted() -> None:
    nixl = ("--set", "transfer.transports=[nixl,tcp]")
    assert configure(*nixl).kv_transports == ("nixl", "tcp")
    with pytest.raises(ValueError, match="nixl does not encrypt"):
        configure(*nixl, "--encrypt")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("--set", "transfer.transports=[cuda_ipc]", "--device", "cpu"), "needs an engine whose KV pool is on a CUDA"),
        (("--set", "transfer.transports=[cuda_ipc]", "--set", "engine.kind=sim"), "needs an engine whose KV pool"),
        (("--set", "transfer.transports=[cuda_ipc,tcp]"), "cuda_ipc alone reads a KV pool on a device"),
    ],
)
def test_cuda_ipc_is_a_transport_for_pools_on_devices_and_for_nothing_else(settings: tuple[str, ...], why: str) -> None:
    assert configure("--set", "transfer.transports=[cuda_ipc]").kv_transports == ("cuda_ipc",)
    with pytest.raises(ValueError, match=why):
        configure(*settings)


def test_every_flag_names_a_key_of_the_configuration() -> None:
    for flag in cli.FLAGS:
        value_of(Config(), flag.key)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (("--engine", "sim"), "no device"),
        (("--quantization", "int8"), "on the CPU only"),
        (("--set", "transfer.transports=[shm]"), "cuda_ipc alone"),
    ],
)
def test_what_cuda_does_not_do_yet_is_refused_by_the_configuration(settings: tuple[str, ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        configure("--device", "cuda", *settings)


@pytest.mark.parametrize("value", ["0.1", "0", "-1", "3601", "70000", ".inf", ".nan"])
def test_a_lease_that_no_socket_can_keep_is_refused(value: str) -> None:
    assert configure("--set", "transfer.lease_s=3600").transfer.lease_s == 3600
    with pytest.raises(ValueError, match=r"transfer\.lease_s"):
        configure("--set", f"transfer.lease_s={value}")


@pytest.mark.parametrize("key", ["router.request_timeout_s", "cluster.startup_timeout_s", "cluster.stop_grace_s"])
def test_times_are_finite(key: str) -> None:
    with pytest.raises(ValueError, match=key):
        configure("--set", f"{key}=.inf")


def test_who_computes_prompts_is_a_choice_on_cuda_alone() -> None:
    choice = ("--set", "engine.prompt_attention=triton")
    assert configure("--device", "cuda", *choice).engine.prompt_attention == "triton"
    with pytest.raises(ValueError, match=r"engine\.prompt_attention: there is a choice on CUDA only"):
        configure(*choice)


@pytest.mark.parametrize(
    ("setting", "what"),
    [("engine.kv_dtype=fp8", "engine.kv_dtype fp8"), ("model.dtype=float32", "model.dtype float32")],
)
def test_flash_is_refused_at_once_where_it_would_not_compute(setting: str, what: str) -> None:
    for choice in ("auto", "triton"):
        configure("--device", "cuda", "--set", setting, "--set", f"engine.prompt_attention={choice}")
    why = f"^engine.prompt_attention: flash does not compute with {what}; take auto or triton$"
    with pytest.raises(ValueError, match=why):
        configure("--device", "cuda", "--set", setting, "--set", "engine.prompt_attention=flash")
    configure("--device", "cuda", "--set", "engine.prompt_attention=flash")


def test_kv_on_a_cuda_device_travels_by_cuda_ipc() -> None:
    assert configure("--device", "cuda").kv_transports == ("cuda_ipc",)


def test_no_flag_leaves_the_configuration_as_it_is() -> None:
    assert configure() == Config()


def test_a_model_is_taken_verbatim() -> None:
    assert configure("123").model.path == "123"


def test_set_wins_over_flags_and_is_read_as_yaml() -> None:
    config = configure("--tp", "2", "--set", "topology.tp=4", "--set", "transfer.transports=[tcp]")
    assert config.topology.tp == 4
    assert config.transfer.transports == ("tcp",)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("512MiB", 512 * 2**20), ("1GiB", 2**30), ("2GB", 2 * 10**9), ("1.5 gib", 3 * 2**29)]
)
def test_a_size_is_written_as_people_write_it(text: str, num_bytes: int) -> None:
    assert configure("--kv-cache-bytes", text).engine.kv_cache_bytes == num_bytes
    assert configure("--set", f"router.max_body_bytes={text}").router.max_body_bytes == num_bytes


@pytest.mark.parametrize("text", ["1G", "GB", "1.5", "-1", "1GB 2", "9" * 19])
def test_what_is_no_size_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.kv_cache_bytes: '.*' is not a size such as 1073741824, 512MiB"):
        configure("--kv-cache-bytes", text)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("engine.nonsense", "engine.nonsense: no such key"),
        ("engine.max_seqs", "engine.max_seqs: no such key; did you mean engine.max_num_seqs"),
        ("engine.dtype", "engine.dtype: no such key; did you mean model.dtype"),
        ("rooter.port", "rooter: no such key; did you mean router"),
        ("log_levl", "log_levl: no such key; did you mean log_level"),
    ],
)
def test_only_a_key_of_nearly_that_name_is_suggested(key: str, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configure("--set", f"{key}=1")
    assert str(refused.value) == said


def test_set_without_a_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--set topology\.tp: must be key=value"):
        configure("--set", "topology.tp")


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["version"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    took = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "cluster.cli", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(took) < 0.3  # of processor time: what others do on this machine is not ours to test


def test_help_imports_nothing_slow() -> None:
    code = "import sys, cluster.cli, cluster.guardian; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
    )
    assert not {"pydantic", "yaml", "ray", "torch", "numpy", "asyncio", "httpx"} & set(done.stdout.split())


@pytest.mark.parametrize("arguments", [[], ["nothing"], ["serve", "--tp", "x"], ["serve", "--launcher", "k8s"]])
def test_what_can_not_be_understood_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: baton" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "usage", "advice"),
    [
        (["serve", "--prefil-tpp", "2"], "usage: baton serve ", "did you mean --prefill-tp?"),
        (["chat", "--max-tokns=3"], "usage: baton chat ", "did you mean --max-tokens?"),
        (["status", "--nonsense"], "usage: baton status ", "see `baton status --help`"),
    ],
)
def test_an_unknown_flag_is_refused_by_its_own_command(
    arguments: list[str], usage: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(usage)
    assert said.endswith(f"{advice}\n")


def test_status_lists_workers_as_people_count() -> None:
    names = ["decode-10", "decode-2", "prefill-0", "decode-0"]
    shown = status.describe({"workers": [{"worker_id": name} for name in names]}, "http://127.0.0.1:8000")
    rows = [line.split()[0] for line in shown.splitlines()[3:]]
    assert rows == ["decode-0", "decode-2", "decode-10", "prefill-0"]


def test_status_says_what_is_computed_in() -> None:
    numbers = {"dtype": "float32", "kv_dtype": "float32", "quantization": "int8"}
    shown = status.describe({"router": {"serving": True, "status": numbers}}, "http://127.0.0.1:8000")
    assert shown.splitlines()[0].endswith(": serving; float32, weights in int8, KV in float32")
