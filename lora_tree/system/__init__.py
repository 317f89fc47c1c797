"""Differences between operating systems and file systems, each settled in one place."""
