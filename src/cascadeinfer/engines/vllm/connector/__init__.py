"""
The out-of-tree KV connector that lets a running request leave one instance and go on in another.

vLLM loads it by name (`kv_connector_module_path="cascadeinfer.engines.vllm.connector"`, `kv_connector="CascadeConnector"`). It
extends NIXL's pull connector in three places, none of which patches a vLLM file:

- `scheduler_side.py` runs beside vLLM's scheduler: cut, pin, resume, reservations, load report.
- `worker_side.py` runs beside the model runner: handshakes in advance, release of pinned blocks on command.
- `commands.py` attaches the commands to `EngineCore`, where vLLM's utility calls find them; they run between two steps.

`words.py` is how the front end's words come here apart from what clients say, `failures.py` how a fault ends one request
and not the engine, `held_blocks.py` what holds memory beside the requests that run. `cores.py` changes how these
processes wait where model and everything else share the cores of a CPU; `ticket.py` has the few words that travel
between instances.
"""

from cascadeinfer.engines.vllm.connector.cascade_connector import CascadeConnector

__all__ = ["CascadeConnector"]
