"""
What a request may contain: fields reserved for the service (`words.py`), and structured outputs that can be compiled
(`schemas.py`).

`bodies.py` checks bodies before vLLM's serving layer reads them; `limits.py` has what the operator allows.
"""
