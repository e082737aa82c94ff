"""Where instances run: the protocol of a launcher, and the launcher for processes of this machine."""
