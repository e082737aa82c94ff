"""
CascadeInfer: length-aware serving of one LLM on many instances, with live migration of running requests.

Nothing is imported here beyond the version: this package is loaded inside every vLLM EngineCore process (the KV
connector lives in it), which must stay light.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
