"""What can go wrong in training."""


class CorpusError(ValueError):
    """Labelled documents that can't be used; the message names the file and line."""


class TrainingError(ValueError):
    """A run that can't start or go on; the message says why."""
