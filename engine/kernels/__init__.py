"""CPU kernels of our own: C++ without torch, compiled on the machine that runs them (build), called by ctypes (library)."""
