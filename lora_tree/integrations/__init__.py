"""Thin layers between a tree and the libraries that people train and serve with.

No module of them is imported before its user asks for it.
"""
