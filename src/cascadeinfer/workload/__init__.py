"""Workloads: traces and their readers, arrival processes, length distributions."""
