"""Merge methods, one file each: NAME.py holds the class of that name in CamelCase, whose fields are its settings.

_steps.py has what several of them share.
"""
