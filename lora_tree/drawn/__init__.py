"""The tree as lines and as a picture, from headers alone: for a console, a file and a model card.

drawing → node_lines, stale_words → tree_picture
"""
