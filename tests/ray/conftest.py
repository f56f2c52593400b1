"""Every test here runs in a network, pid and mount namespace of its own, so that no Ray sees another.

A test is run by a second pytest inside the namespace; without root it is skipped, and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

_INSIDE = "BATON_TEST_LAB"
_SET_UP = 'ip link set lo up && mount -t tmpfs tmpfs /dev/shm && exec "$@"'


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Hand the test to a pytest inside a fresh lab."""
    if _INSIDE in os.environ:
        return None
    if os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None:
        pytest.skip("needs root, unshare and ip for a namespace of its own")
    lab = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-c", _SET_UP, "lab"]
    inner = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    is_shown = pyfuncitem.config.getoption("capture") == "no"
    done = subprocess.run(
        [*lab, *inner, *(["-s"] if is_shown else [])],
        cwd=pyfuncitem.config.rootpath,
        env={**os.environ, _INSIDE: "1"},
        capture_output=not is_shown,
        text=True,
    )
    if done.returncode != 0 and is_shown:
        pytest.fail("see above", pytrace=False)
    if done.returncode != 0:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    return True
