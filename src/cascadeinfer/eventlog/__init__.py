"""The event log: writing, reading and replaying what a policy received and returned, and telling a request's story."""
