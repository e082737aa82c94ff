"""
Experiments on the simulator: a setting (profile, trace, instances), runs in it, and the search for the highest rate.

The commands `plan`, `simulate` and `sweep` and the grid of `make figures` share this package. `config` reads the files,
`results` summarises the runs, and `figures` draws them.
"""
