"""What Hydra finds of this package: every module here is read at the start of every Hydra app, so imports stay small."""
