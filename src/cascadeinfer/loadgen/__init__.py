"""Load on a live server: prompts of given lengths, streamed requests, replay of a trace in open loop."""
