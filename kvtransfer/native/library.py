"""The C functions as Python sees them. Knows no pools and no frames; callers answer for every address."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from ctypes import c_char_p, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any, Final

from baton import native_build
from baton.native_build import NativeUnavailable

log = logging.getLogger("kvtransfer")

_ABI: Final = 7
_SOURCE: Final = Path(__file__).parent / "src" / "pieces.cpp"
_FLAGS: Final = (*native_build.FLAGS, "-O3")
_SIGNATURES: Final[dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "baton_pieces_abi": (c_int32, ()),
    "baton_digest_width": (None, (c_int32,)),
    "baton_landed": (None, (c_void_p, c_void_p, c_uint64, c_void_p)),
    "baton_digest": (c_uint64, (c_void_p, c_uint64, c_void_p, c_void_p)),
    "baton_copy": (None, (c_void_p, c_void_p, c_uint64, c_void_p, c_int32)),
    "baton_send": (c_int64, (c_int32, c_char_p, c_void_p, c_void_p, c_uint64, c_uint64)),
    "baton_receive": (c_int64, (c_int32, c_void_p, c_void_p, c_uint64, c_void_p, c_int32)),
}


class Library:
    """The loaded functions: see src/pieces.cpp. Every call releases the GIL."""

    def __init__(self, path: Path) -> None:
        """Load a shared object.

        Raises:
            NativeUnavailable: it is of another version.
        """
        c = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(c, name)
            function.restype, function.argtypes = result, arguments
        if c.baton_pieces_abi() != _ABI:
            raise NativeUnavailable(f"{path} is of another version")
        self.digest_width: Final = c.baton_digest_width
        self.landed: Final = c.baton_landed
        self.digest: Final = c.baton_digest
        self.copy: Final = c.baton_copy
        self.send: Final = c.baton_send
        self.receive: Final = c.baton_receive


@functools.cache
def library() -> Library | None:
    """The native functions; None where there are none, which is logged. Blocks for seconds when it must compile."""
    try:
        if os.environ.get(native_build.VARIABLE) == "off":
            raise NativeUnavailable(f"${native_build.VARIABLE} is off")
        if sys.byteorder != "little":
            raise NativeUnavailable("this machine is big-endian")
        return Library(native_build.built(_SOURCE, _FLAGS))
    except (NativeUnavailable, OSError) as error:
        log.warning("KV bytes are copied and digested by Python packages, slower", extra={"reason": str(error)})
        return None


def main() -> None:
    """`python -m kvtransfer.native.library`: compile now, so that no first start has to wait for it."""
    sys.stdout.write(f"KV copies and digests: {'Python packages' if library() is None else 'native'}\n")


if __name__ == "__main__":
    main()
