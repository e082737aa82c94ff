"""
The event log: what a policy was given and what it answered; writing, reading, replaying it and telling a request's
story.
"""
