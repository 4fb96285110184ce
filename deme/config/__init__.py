"""The configuration of an experiment and the paths that follow from it."""
