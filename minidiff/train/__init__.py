"""Training on accelerate: losses, moving averages, one resumable loop, and the recipes of every weight that ships."""
