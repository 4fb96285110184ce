"""Scores of images: features, distances, reference statistics."""
