"""
Options: each is defined once and read in one place.

`cascadeinfer.config.profiles` finds cost profiles.
"""
