"""Engines run the model: one protocol, a simulated engine, and vLLM."""
