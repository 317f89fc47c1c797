"""Merged paths: what a switch writes into the weights, and how it brings the base's own back."""
