"""Kinds of files that labelled documents come in: a module each, with a ``read`` that streams."""
