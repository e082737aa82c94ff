"""Fixtures of the command line's tests."""

from pathlib import Path

import pytest
from experiment_words import mixed_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Short requests, requests with long prompts, and some with long outputs."""
    return mixed_trace(tmp_path)
