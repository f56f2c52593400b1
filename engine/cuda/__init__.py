"""The CUDA backends behind the engine's seams. Only `engine.native` imports them, and only where CUDA computes."""
