"""
What a request may say: words that only the service itself may use (`words.py`), and structured outputs that can be compiled (`schemas.py`).

`bodies.py` looks at bodies before vLLM's serving layer reads them; `limits.py` has what the operator allows.
"""
