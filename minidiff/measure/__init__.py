"""Is it good, how far is it from the data, how big is it, how fast."""
