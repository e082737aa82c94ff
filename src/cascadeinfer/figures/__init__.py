"""Pictures of results. Each function takes records or summaries and returns a matplotlib figure."""
