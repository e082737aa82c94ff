"""The live shell: events in, effects carried out on real engines."""
