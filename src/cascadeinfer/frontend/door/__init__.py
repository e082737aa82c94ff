"""
The door: what every HTTP request passes before vLLM's server sees it.

`connections.py` limits connections, heads and bodies in time and size; `routes.py` says which key a route requires;
`keys.py` compares keys; `door.py` is the ASGI app that combines them.
"""
