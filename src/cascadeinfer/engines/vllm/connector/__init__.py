"""
The out-of-tree KV connector that lets a running request leave one instance and continue on another.

vLLM loads it by name (`kv_connector_module_path="cascadeinfer.engines.vllm.connector"`,
`kv_connector="CascadeConnector"`). It extends NIXL's pull connector in three places, without patching a vLLM file:

- `scheduler_side.py` runs beside vLLM's scheduler: cut, pin, resume, reservations, load report.
- `worker_side.py` runs beside the model runner: handshakes in advance, release of pinned blocks on command.
- `commands.py` attaches the commands to `EngineCore`, where vLLM's utility calls find them; they run between two steps.

`words.py` carries the front end's instructions separately from what clients can send, `failures.py` makes a fault end
one request instead of the engine, and `held_blocks.py` reports what holds memory besides running requests. `cores.py`
changes how these processes wait where the model and everything else share a CPU's cores; `ticket.py` defines the fields
that travel between instances.
"""

from cascadeinfer.engines.vllm.connector.cascade_connector import CascadeConnector

__all__ = ["CascadeConnector"]
