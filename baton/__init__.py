"""What every Baton process shares: requests, KV layout, config, errors, wire format, logging, clock."""

from typing import Final

__version__: Final = "0.1.0"
