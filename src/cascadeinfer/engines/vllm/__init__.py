"""
vLLM as an engine: one EngineCore process per instance, our connector inside it, stock vLLM around it.

Modules here import vLLM; nothing else in the package does, the front end excepted. This file imports nothing: the connector is
loaded inside vLLM's own processes, which must stay light.
"""
