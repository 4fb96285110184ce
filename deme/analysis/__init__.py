"""The analyses of analyze.py, one module each, with the same two functions:

measure(material) -> arrays by name, kept in the analysis folder
report(arrays, material) -> tables as Markdown, and figures by name
"""
