"""The service: documents over HTTP, read in steps that any documents share."""
