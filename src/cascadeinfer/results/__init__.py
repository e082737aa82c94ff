"""Results of runs: records, summaries and comparisons, with the provenance that goes into every output file."""
