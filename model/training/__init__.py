"""How a classifier is trained and measured: labelled documents in, a checkpoint out."""
