"""Stable Diffusion: a checkpoint's parts, the run that draws with them, and what it may be told."""
