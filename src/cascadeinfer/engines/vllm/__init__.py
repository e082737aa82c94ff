"""
vLLM as an engine: one EngineCore process per instance, our connector inside it, stock vLLM around it.

`launch.py` turns vLLM's options into instances, `instance.py` is one instance, `channel.py` its command channel,
`owned.py` and `attached.py` its life cycle, and `connector/` our half inside the EngineCore. This file imports nothing:
the connector is loaded in vLLM's own processes, which must stay light.
"""
