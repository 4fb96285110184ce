"""Decouple-then-Merge for diffusion models (CVPR 2025, arXiv 2410.06664): what the scripts share.

The glossary in docs/architecture.md explains the words that the code uses.
"""
