"""Gathers the doctor's facts: `running.py` starts a process per part, `parts.py` is what runs in it."""
