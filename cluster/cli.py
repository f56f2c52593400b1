"""The `baton` command: what can be typed, and which module answers. Imports nothing slow before it is needed.

There are no defaults here: a flag of `serve` sets one key of baton/config.py, where the default stands.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from baton.command_line import Parser
from loadtest import arguments as bench_arguments

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 130


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of `serve` and the configuration key that it sets."""

    name: str
    key: str
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    type: Callable[[str], Any] = str
    const: str | None = None
    """What the flag means; it then takes no value."""


FLAGS: Final = (
    Flag("--prefill", "topology.prefill", "number of prefill workers", "N", type=int),
    Flag("--decode", "topology.decode", "number of decode workers", "N", type=int),
    Flag("--mixed", "topology.mixed", "number of workers that do both; alone: aggregated serving", "N", type=int),
    Flag("--tp", "topology.tp", "tensor parallelism of each worker", "N", type=int),
    Flag("--prefill-tp", "topology.prefill_tp", "tensor parallelism of prefill workers, if different", "N", type=int),
    Flag("--dtype", "model.dtype", "data type of weights and KV", choices=("auto", "float32", "bfloat16")),
    Flag("--max-model-len", "model.max_model_len", "most tokens of a request, prompt included", "N", type=int),
    Flag("--quantization", "model.quantization", "of weights: int8 on the CPU, fp8 on CUDA", choices=("int8", "fp8")),
    Flag("--served-model-name", "model.served_model_name", "the name that clients use", "S"),
    Flag("--kv-cache-bytes", "engine.kv_cache_bytes", "KV cache of each rank: bytes, or such as 512MiB or 2GB", "SIZE"),
    Flag("--engine", "engine.kind", "the real engine, or one that only simulates", choices=("native", "sim")),
    Flag("--device", "engine.device", "where the engine computes", choices=("auto", "cpu", "cuda")),
    Flag("--launcher", "cluster.launcher", "start processes by Ray or directly", choices=("ray", "local")),
    Flag("--address", "cluster.address", "join this Ray cluster instead of embedding one", "auto|HOST:PORT"),
    Flag("--encrypt", "cluster.encryption", "TLS for KV over TCP and for routers' talk with workers", const="tls"),
    Flag("--routers", "topology.routers", "number of routers; in a Ray cluster on different nodes", "N", type=int),
    Flag("--host", "router.host", "address that clients connect to; node: that of the router's node", "ADDR"),
    Flag("--port", "router.port", "HTTP port; 0 takes a free one", "N", type=int),
    Flag("--grpc-port", "router.grpc_port", "gRPC port; 0 takes a free one", "N", type=int),
    Flag("--api-key-file", "router.api_key_file", "file of API keys that clients must present", "F"),
    Flag("--log-level", "log_level", "of all processes", choices=("debug", "info", "warning", "error")),
)


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """Configuration settings from the flags that were given; `--set` wins.

    Raises:
        ValueError: a `--set` without "=".
    """
    settings: dict[str, Any] = {}
    if arguments.model is not None:
        settings["model.path"] = _verbatim(arguments.model)
    for flag in FLAGS:
        value = getattr(arguments, flag.key)
        if value is not None:
            settings[flag.key] = _verbatim(value)
    for item in arguments.set or ():
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ValueError(f"--set {item}: must be key=value")
        settings[key] = value
    return settings


def _verbatim(value: object) -> object:
    """Text as YAML that reads as this text, whatever it looks like ("1e3", "no")."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else value


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    top = Parser(prog="baton", description="Disaggregated prefill/decode serving of large language models.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve", help="serve a model", description=_SERVE_TEXT, usage="baton serve [MODEL] [FLAGS]"
    )
    serve.add_argument("model", nargs="?", metavar="MODEL", help="a Hugging Face directory or hub id; none: a demo")
    for flag in FLAGS:
        if flag.const is not None:
            serve.add_argument(flag.name, dest=flag.key, action="store_const", const=flag.const, help=flag.help)
            continue
        serve.add_argument(
            flag.name, dest=flag.key, metavar=flag.metavar, choices=flag.choices, type=flag.type, help=flag.help
        )
    serve.add_argument(
        "--log-format", choices=("auto", "json", "text"), help="this terminal's lines; auto: text on a tty"
    )
    serve.add_argument("--config", metavar="FILE", help="YAML file of configuration keys; flags override it")
    serve.add_argument("--set", metavar="KEY=VALUE", action="append", help="set any configuration key; repeatable")

    chat = commands.add_parser("chat", help="talk to a server", description="Talk to a running server.")
    chat.add_argument("question", nargs="?", help="ask this and end; none: a conversation")
    chat.add_argument("--max-tokens", type=int, metavar="N", help="longest answer")
    chat.add_argument("--temperature", type=float, metavar="T", help="0: always the likeliest token")
    chat.add_argument("--api-key-file", metavar="F", help="file whose first line is the API key (or set BATON_API_KEY)")

    status = commands.add_parser("status", help="workers, blocks, requests of a server")
    status.add_argument("--json", action="store_true", help="for programs")

    trace = commands.add_parser("trace", help="where a request's time went")
    trace.add_argument("request_id", nargs="?", metavar="ID", help="none: the latest")
    trace.add_argument("--json", action="store_true", help="for programs")

    bench = commands.add_parser("bench", help="send a load and measure it", description=_BENCH_TEXT)
    bench_arguments.add_to(bench)

    scale = commands.add_parser("scale", help="more or fewer workers of a running server")
    for role in ("prefill", "decode", "mixed"):
        scale.add_argument(f"--{role}", type=int, metavar="N", help=f"so many {role} workers")

    down = commands.add_parser("down", help="end a server of yours")
    down.add_argument("--all", action="store_true", help="end all of them")

    for command in (chat, status, trace, scale, down):
        command.add_argument("--url", metavar="URL", help="of the server, if several run")
        command.add_argument("--port", type=int, metavar="N", help="HTTP port of the server, if several run")
    commands.add_parser("version", help="versions of Baton and of what it uses")
    return top


_SERVE_TEXT: Final = (
    "Serve MODEL over HTTP (OpenAI-compatible) and gRPC. Prefill and decode run in different workers; with --mixed N "
    "they do not. Defaults and all other settings: baton/config.py, --config, --set."
)


_BENCH_TEXT: Final = "Send a load to a server and measure what clients see. Without a mode: run."


def _serve(arguments: argparse.Namespace, began: float) -> int:
    from cluster import guardian

    request = {
        "config_file": arguments.config,
        "settings": settings_of(arguments),
        "log_format": arguments.log_format,
        "program": _program(),
    }
    return guardian.serve(request, began)


def _program() -> str:
    """How the user can call `baton` again: by the same words, or by name where the PATH has this very one."""
    if not os.path.basename(sys.argv[0]).startswith("baton"):
        return f"{sys.executable} -m cluster.cli"
    found = shutil.which("baton")
    return "baton" if found is not None and os.path.abspath(sys.argv[0]) == found else sys.argv[0]


def _chat(arguments: argparse.Namespace) -> int:
    from cluster import chat

    return chat.run(arguments)


def _status(arguments: argparse.Namespace) -> int:
    from cluster import status

    return status.run(arguments)


def _trace(arguments: argparse.Namespace) -> int:
    from cluster import trace

    return trace.run(arguments)


def _bench(arguments: argparse.Namespace) -> int:
    from cluster import bench

    return bench.run(arguments)


def _scale(arguments: argparse.Namespace) -> int:
    from cluster import scale

    return scale.run(arguments)


def _down(arguments: argparse.Namespace) -> int:
    from cluster import down

    return down.run(arguments)


def _version(arguments: argparse.Namespace) -> int:
    from cluster import version

    return version.run()


_COMMANDS: Final = {
    "chat": _chat,
    "status": _status,
    "trace": _trace,
    "bench": _bench,
    "scale": _scale,
    "down": _down,
    "version": _version,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit status (2: it can not be understood, 1: it failed)."""
    began = time.monotonic()
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(["version"] if words == ["--version"] else bench_arguments.with_mode(words))
    from cluster.client import ClientError
    from cluster.run_dir import RunDirError

    try:
        if arguments.command == "serve":
            return _serve(arguments, began)
        return _COMMANDS[arguments.command](arguments)
    except ValueError as error:
        sys.stderr.write(f"baton: {error}\n")
        return EXIT_USAGE
    except (RunDirError, ClientError) as error:
        sys.stderr.write(f"baton: {error}\n")
        return EXIT_FAILED
    except BrokenPipeError:  # the reader has seen enough (`baton status | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
