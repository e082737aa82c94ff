"""
Several front-end processes over the same instances.

Process 0 owns the instances, the listening socket and the other processes; the others are its *followers*. Every
process has vLLM's app, a runtime and a policy of its own over the requests it has accepted, and sees the load of all in
the instances' reports: no decision about a request waits for another process. What process 0 tells the others (who is
up, which stages are in force) and what they tell it (what they have seen) goes over a socket between two processes, a
message now and then.
"""
