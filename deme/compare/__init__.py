"""Comparisons: many runs as a graph of jobs, run here or on a cluster, and the table of their scores."""
