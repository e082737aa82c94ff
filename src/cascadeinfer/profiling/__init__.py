"""
Measures a running engine over a grid of batches and makes a cost profile of it.

`grid.py` lists the batches that the engine can hold; `measure.py` brings the engine into each of them through the
engine protocol and collects the steps that the engine itself timed; `log.py` keeps them on disk as they arrive;
`statistics.py` reduces them to medians; `fitting.py` fits the step model and checks it on batches that it has not seen;
`profiler.py` does all this within a time budget and writes down the result. Nothing here knows the engine's type: a
`Subject` (`subject.py`) is all it gets.
"""
