"""The bid-ask protocol: who moves a request inside a stage or to the next one, agreed by messages between instances."""
