"""
Options: each defined once, read in one place.

Cost profiles are found by `cascadeinfer.config.profiles`.
"""
