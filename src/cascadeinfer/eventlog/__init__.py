"""
The event log: the events a policy received and the effects it returned. Writing, reading and replaying it, and telling
a request's story.
"""
