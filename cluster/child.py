"""The first code of every process that Baton starts: it makes the process end with its parent, then runs a module.

`python -m cluster.child PARENT_PID SIGNAL NAME MODULE [ARG..]`. It is the child that asks for this, because a parent with
threads can only do so in a `preexec_fn`, which may deadlock. Standard library only.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cluster import process_tree

SOURCE_ROOT: Final = Path(__file__).resolve().parent.parent
_POOLS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_GRPC_SUITES: Final = "ECDHE-RSA-AES128-GCM-SHA256"
"""What gRPC may use below TLS 1.3. The cluster's certificates have no RSA key, so it comes to TLS 1.3 or nothing.

grpcio can not be told so in any other way, and reads this when it is imported.
"""


def command(signum: int, name: str, module: str, *arguments: str) -> list[str]:
    """The argv that runs `module` as a child of this process, which gets `signum` when this process dies.

    `-P`: the working directory is the user's; a `router.py` lying in it is not ours.
    """
    return [sys.executable, "-P", "-m", "cluster.child", str(os.getpid()), str(int(signum)), name, module, *arguments]


def environment(base: Mapping[str, str], threads: int = 1) -> dict[str, str]:
    """`base` with what our processes need: their code wherever they start, unbuffered logs, no hidden thread pools,
    nothing older than TLS 1.3 between them.
    """
    env = dict(base)
    if SOURCE_ROOT.name not in ("site-packages", "dist-packages"):
        paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
        if str(SOURCE_ROOT) not in paths:
            env["PYTHONPATH"] = os.pathsep.join([str(SOURCE_ROOT), *paths])
    env["PYTHONUNBUFFERED"] = "1"
    env["GRPC_SSL_CIPHER_SUITES"] = _GRPC_SUITES
    env.update(dict.fromkeys(_POOLS, str(threads)))
    return env


def main() -> None:
    """Tie this process to its parent and become `MODULE`."""
    parent, signum, name, module, *arguments = sys.argv[1:]
    if not process_tree.end_with_parent(int(parent), int(signum)):
        sys.exit(1)
    process_tree.set_name(name)
    sys.argv[:] = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
