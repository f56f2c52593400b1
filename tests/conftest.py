"""What must be so before any test module is imported."""

from __future__ import annotations

import os
import signal
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, by whatever library does so first

# What runs in the background or under nohup ignores these, and so would every server that a test starts and signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
