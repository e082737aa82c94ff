"""The parts of `cascadeinfer demo`: its chat requests, its server, and its terminal views."""
