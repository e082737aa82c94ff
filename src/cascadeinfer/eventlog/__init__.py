"""The event log: what a policy was given and what it answered, written, read, replayed and told as a story."""
