"""Merge methods, one file each: NAME.py holds the class of that name in CamelCase, whose fields are its settings."""
