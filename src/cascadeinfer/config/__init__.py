"""Options: each defined once, read in one place."""
