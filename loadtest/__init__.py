"""The load test of a service over HTTP: what it sends, when, and what it makes of the answers."""
