"""Seeing what the mathematics does: films of the process."""
