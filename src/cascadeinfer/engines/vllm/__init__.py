"""
vLLM as an engine: one EngineCore process per instance, our connector inside it, stock vLLM around it.

`launch.py` turns vLLM's options into instances, `instance.py` is one of them, `channel.py` its commands, `owned.py` and
`attached.py` how it comes and goes, `connector/` our half inside the EngineCore. This file imports nothing: the
connector is loaded in vLLM's own processes, which must stay light.
"""
