"""The analyses of analyze.py, one module each.

Each module has the same three functions:

    measure(material) -> arrays by name, kept in the analysis folder
    plot(arrays, material) -> figures by name
    table(arrays, material) -> the same in numbers, as Markdown

To add an analysis, write such a module and give it a line in ANALYSES of deme/config/sections.py.
"""
