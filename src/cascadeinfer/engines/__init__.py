"""Engines: what runs the model. One protocol, a simulated engine, and vLLM."""
