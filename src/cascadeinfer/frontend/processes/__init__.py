"""
Several front-end processes over the same instances.

Process 0 owns the instances (those of a fleet it finds, starts and ends), the listening socket and the other processes,
its *followers*. Every process has vLLM's app, a runtime and its own policy over the requests it has accepted, and sees
the load of all in the instances' reports: no decision about a request waits for another process. Process 0 tells the
others which instances are up and which stages are in force, and they report what they have seen, over a socket pair
each, a few messages at a time.
"""
