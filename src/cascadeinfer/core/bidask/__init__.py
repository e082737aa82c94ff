"""The bid-ask protocol: instances agree by messages who takes a request, inside a stage or in the next one."""
