"""Load on a live server: prompts of given lengths, streamed requests, open-loop replay of a trace."""
