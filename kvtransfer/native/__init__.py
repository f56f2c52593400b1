"""Digests and copies of scattered bytes in C++, one call for many pieces and the GIL released meanwhile.

library   loads it, compiled on first use; src/ has xxh3 and the walk over pieces
"""
