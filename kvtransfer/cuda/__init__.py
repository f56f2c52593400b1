"""KV pools in the memory of CUDA devices: what is asked of a driver, the real one, and its two kernels.

driver     the interface, and what the kernels compute, in numpy; tests have another implementation
libcuda    over libcuda and libnvrtc by ctypes; loaded where a pool is on a device, never otherwise
kernels    .cu: copy scattered pieces, digest scattered pieces
"""
