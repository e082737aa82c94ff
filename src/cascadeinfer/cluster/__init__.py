"""Where instances run: processes on this machine."""
