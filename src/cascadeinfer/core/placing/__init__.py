"""Where a request goes: prices, admission, prefix affinity, and what leaves an instance that drains."""
