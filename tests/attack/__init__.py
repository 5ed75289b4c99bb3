"""What strangers send: requests as raw bytes, against a service that listens."""
