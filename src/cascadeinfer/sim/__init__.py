"""
The simulator: iteration-level continuous batching in virtual time, around the same policy objects as the runtime.

Pure, like the core: no clock, no I/O, all randomness from generators passed in.
"""
