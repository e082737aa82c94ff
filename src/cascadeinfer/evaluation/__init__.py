"""
Experiments on the simulator: a setting (profile, trace, instances), runs of policies in it, the search for the highest rate.

The commands `plan`, `simulate` and `sweep` and the grid of `make figures` share these. Reading files happens in `config`; what a run
leaves behind is summed up in `results` and drawn in `figures`.
"""
