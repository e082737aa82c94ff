"""Of several instances none is known to have an image in its cache: it is sent whole, every time."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.multimodal.cache.base import MultiModalProcessorOnlyCache
from vllm.multimodal.cache.factories import processor_cache_from_config

from cascadeinfer.frontend.engine_client import with_whole_media


@pytest.mark.parametrize("n_processes", [1, 4])
def test_images_are_never_left_out(n_processes: int) -> None:
    """VLLM's cache at our front end omits nothing; the engines' configuration stays."""
    config = VllmConfig()
    media = SimpleNamespace(mm_processor_cache_gb=0.001, mm_processor_cache_type="lru")
    model: Any = SimpleNamespace(supports_multimodal_inputs=True, get_multimodal_config=lambda: media)
    config.model_config = model
    config.parallel_config._api_process_count = n_processes
    assert isinstance(processor_cache_from_config(with_whole_media(config)), MultiModalProcessorOnlyCache)
    assert config.parallel_config._api_process_count == n_processes
