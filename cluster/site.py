"""What a server has on one node: its directory, its copy of the model, and whether the node runs the same code.

Everything here happens on that node, in whatever process starts Baton's own there. Knows no Ray.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from baton.config import ConfigError
from cluster import run_dir, topology, version
from cluster.host import ProcessOrder
from cluster.run_dir import RunDir

OWN_ADDRESS: Final = "node"
"""As `router.host`: the address of the node that the router is on."""


class SiteError(ValueError):
    """A node can not take part; the message names the node and says why."""


@dataclass(frozen=True, slots=True)
class Home:
    """What a server wants of every node. Travels to it."""

    run_id: str
    code: str
    """version.code_digest() of the supervisor's node; "": this is the only node."""
    model_source: str | None
    """What the node resolves to a directory of its own (ModelChoice.source); None: no model."""


@dataclass(frozen=True, slots=True)
class Site:
    """A server's place on this node."""

    address: str
    """Where other nodes reach its processes."""
    run: RunDir
    model_path: str | None
    """Directory on this node; None: as ordered."""

    def make_private_dir(self, name: str) -> None:
        """A directory (0700) in the run directory for one start of a worker, in place of those of earlier starts."""
        path = self.run.path / name
        worker = path.name.rpartition("-")[0]
        for earlier in path.parent.glob(f"{worker}-*") if path.parent.is_dir() else ():
            if earlier != path and earlier.name.rpartition("-")[0] == worker:
                shutil.rmtree(earlier, ignore_errors=True)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def remove_private_dir(self, name: str) -> None:
        """Delete it; no process of that start is left."""
        shutil.rmtree(self.run.path / name, ignore_errors=True)

    def localize(self, order: ProcessOrder) -> ProcessOrder:
        """The order with this node's address and paths in its specification."""
        spec: dict[str, Any] = dict(order.spec)
        if "worker_dir" in spec:
            spec["worker_dir"] = str(self.run.path / spec["worker_dir"])
            spec["host"] = self.address
        if spec.get("host") == OWN_ADDRESS:
            spec["host"] = self.address
        if self.model_path is not None:
            if spec.get("model_dir"):
                spec["model_dir"] = self.model_path
            if isinstance(spec.get("model"), Mapping) and spec["model"].get("path"):
                spec["model"] = {**spec["model"], "path": self.model_path}
        return replace(order, spec=spec)


def survey(code: str, model_source: str | None) -> int:
    """Check that this node can take part in a server; the priority (nice) at which its processes would run.

    Raises:
        SiteError: other code, no such model, no place for the run directory.
    """
    _check_code(code)
    _find_model(model_source)
    try:
        run_dir.base_dir()
    except run_dir.RunDirError as error:
        raise SiteError(f"{socket.gethostname()}: {error}") from error
    return os.getpriority(os.PRIO_PROCESS, 0)


def join(home: Home, address: str) -> Site:
    """This node's part of a server, made if absent, and held until `run_dir.leave`.

    Raises:
        SiteError: as `survey`.
    """
    if home.code:
        _check_code(home.code)
    model_path = _find_model(home.model_source)
    try:
        return Site(address, run_dir.join(home.run_id), model_path)
    except (run_dir.RunDirError, OSError) as error:
        raise SiteError(f"{socket.gethostname()}: {error}") from error


def _check_code(expected: str) -> None:
    found = version.code_digest()
    if found != expected:
        raise SiteError(
            f"{socket.gethostname()} has {found} in {Path(version.__file__).parent.parent}, the supervisor {expected}: "
            "install the same Baton on every node"
        )


def _find_model(source: str | None) -> str | None:
    try:
        return None if source is None else topology.find_model(source)
    except ConfigError as error:
        raise SiteError(f"{socket.gethostname()}: {error}") from error
