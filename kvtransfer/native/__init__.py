"""Digests, copies and socket I/O of scattered bytes in C++: one call for many pieces, without the GIL.

library   loads it, compiled on first use; src/ has xxh3 and the walk over pieces
"""
