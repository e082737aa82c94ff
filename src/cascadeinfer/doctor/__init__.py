"""
Whether this machine, and the engines that others have started, can serve with live moves: `cascadeinfer doctor`.

    gathering/   gathers facts, each part in a process of its own, bounded in time
    facts.py     what is gathered, as typed data
    checks/      pure: facts in, verdicts out, each with what was found and how to mend it
    report.py    everything in one file, for an issue
"""
