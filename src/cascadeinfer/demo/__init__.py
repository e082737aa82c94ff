"""The parts of `cascadeinfer demo`: its chat requests, its server, and what it shows in the terminal."""
