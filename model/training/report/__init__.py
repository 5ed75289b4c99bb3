"""What a run came to, as one HTML page."""
