"""A server's address as people type it. Standard library only: every command reads this."""

from __future__ import annotations

from urllib.parse import urlsplit


def server_root(text: str) -> str:
    """The root of the server that a URL means: without the /v1 that other tools want at its end.

    Raises:
        ValueError: it is no HTTP URL.
    """
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # a port that is no number
        is_url = False
    if not is_url:
        raise ValueError(f"{text}: not a URL such as http://127.0.0.1:8000")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")
