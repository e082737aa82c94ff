"""
The scheduling core: pure decisions.

Rules: no clock (time is an argument), no I/O, no asyncio, no logging, no environment, no global random state, no
engine. A policy takes events and returns effects. The simulator (`cascadeinfer.sim`) and the runtime
(`cascadeinfer.runtime`) are two shells around the same policies. An import-linter contract and `tests/test_tidy.py`
enforce this.
"""
