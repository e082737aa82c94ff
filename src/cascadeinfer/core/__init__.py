"""
The scheduling core: pure decisions.

Rules: no clock (time is an argument), no I/O, no asyncio, no logging, no environment, no global random state, no engine.
A policy gets events and returns effects; the simulator (`cascadeinfer.sim`) and the runtime (`cascadeinfer.runtime`) are
two shells that run the same policy object. An import-linter contract and `tests/test_tidy.py` enforce this.
"""
