"""The doctor's checks: pure functions from facts to verdicts, one file per subject."""
