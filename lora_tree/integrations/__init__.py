"""The tree in the tools that people train and serve with: thin, and imported only when asked
for.
"""
