"""
Workloads: traces of real services, arrival processes, length distributions.

Pure: readers take lines of text, never paths (`cascadeinfer.config.traces` opens files), and every sampler draws from a
generator that is passed in.
"""
