"""Archives by the million: inputs in parts, each read as a whole, its answers in a file of its own.

On one machine, or on many by Ray Data, where every actor does what the one machine does.
"""
