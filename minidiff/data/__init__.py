"""The data: captioned scenes drawn by code, two-dimensional sets, and files of your own."""
