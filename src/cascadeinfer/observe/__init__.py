"""What happened, as data: request records, summaries, figures, event logs."""
