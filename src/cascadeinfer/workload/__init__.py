"""
Workloads: traces of real services, arrival processes, length distributions.

Pure: readers take lines of text, never paths (files are opened in `cascadeinfer.config.traces`), and every sampler draws from a
generator that is passed in.
"""
