"""How the other commands find a server and ask it something. Standard library only: they answer at once."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from baton import auth
from cluster import run_dir
from cluster.run_dir import Server
from loadtest.url import server_root

_TIMEOUT_S: Final = 10.0


class ClientError(Exception):
    """Why the command failed: one sentence for the user."""


class NotFound(ClientError):
    """The server does not know what was asked for."""


class Refused(ClientError):
    """The server wants a key or a secret that it was not given."""


_REFUSALS: Final = {401: Refused, 404: NotFound}


@dataclass(frozen=True, slots=True)
class Connection:
    """A server's HTTP API. Without a `token` its internal paths are closed."""

    url: str
    token: str | None
    server: Server | None = None
    """What its state file says, if it is ours."""

    @contextlib.contextmanager
    def request(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = _TIMEOUT_S,
    ) -> Iterator[http.client.HTTPResponse]:
        """A successful answer, to be read inside.

        Raises:
            NotFound: 404.
            Refused: 401.
            ClientError: any other refusal, or nobody answers.
        """
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=timeout_s)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(
                method, parts.path.rstrip("/") + path, data, {"content-type": "application/json", **(headers or {})}
            )
            response = connection.getresponse()
            if response.status >= 400:
                raise _REFUSALS.get(response.status, ClientError)(_message(response))
            yield response
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ClientError(f"{self.url} does not answer: {why}") from error
        finally:
            connection.close()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """A JSON answer."""
        with self.request("GET", path, headers=headers) as response:
            answer = json.loads(response.read())
        assert isinstance(answer, dict)
        return answer

    def ask(self, path: str) -> dict[str, Any]:
        """A JSON answer of an internal path.

        Raises:
            ClientError: we do not know this cluster's secret, or as `request`.
        """
        try:
            return self.get(path, {} if self.token is None else {"authorization": self.token})
        except Refused as error:
            whose = "is not a server of yours" if self.token is None else f"refuses the secret that is set ({error})"
            raise ClientError(
                f"{self.url} {whose}; set {auth.SECRET_ENV} or {auth.SECRET_FILE_ENV} to its secret"
            ) from error


def connect(arguments: argparse.Namespace) -> Connection:
    """The server that `--url` or `--port` means, or the only one there is.

    Raises:
        ClientError: there is none, or more than one.
    """
    servers = [server for server in run_dir.servers() if server.is_alive]
    if (wanted := wanted_url(arguments)) is not None:
        for server in servers:
            if is_at(server, wanted):
                return Connection(wanted, server.token, server)
        return Connection(wanted, _token_of_environment())
    server = choose(servers)
    if server.url is None:
        raise ClientError(f"the server (process {server.guardian.pid}) is still starting")
    return Connection(server.url, server.token, server)


def wanted_url(arguments: argparse.Namespace) -> str | None:
    """The root of the server that `--url` (an OpenAI `base_url` too) or `--port` means; None: neither is given.

    Raises:
        ClientError: it is no URL.
    """
    if arguments.url is None:
        return None if arguments.port is None else f"http://127.0.0.1:{arguments.port}"
    try:
        return server_root(str(arguments.url))
    except ValueError as error:
        raise ClientError(str(error)) from error


def is_at(server: Server, url: str) -> bool:
    """Whether a server of this machine listens there, whatever loopback is called."""
    return _port(url) in map(_port, server.urls)


def choose(servers: list[Server]) -> Server:
    """The only one.

    Raises:
        ClientError: there is none, or more than one.
    """
    if not servers:
        raise ClientError("no server of yours is running; start one with `baton serve`, or name one with --url")
    if len(servers) > 1:
        urls = ", ".join(server.url or f"process {server.guardian.pid}, starting" for server in servers)
        raise ClientError(f"several servers of yours are running ({urls}); choose one with --port")
    return servers[0]


def _token_of_environment() -> str | None:
    if auth.SECRET_ENV not in os.environ and auth.SECRET_FILE_ENV not in os.environ:
        return None
    try:
        return auth.worker_token(auth.load_secret())
    except (OSError, ValueError) as error:
        raise ClientError(str(error)) from error


def _port(url: str) -> tuple[str, int | None]:
    parts = urlsplit(url)
    host = parts.hostname or ""
    return "127.0.0.1" if host in ("localhost", "0.0.0.0", "::1", "::") else host, parts.port


def _message(response: http.client.HTTPResponse) -> str:
    text = response.read().decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(json.loads(text)["error"]["message"])
    return f"HTTP status {response.status}: {text[:200]}"
