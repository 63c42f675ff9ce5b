"""Every figure is a function: plain data in, a matplotlib Figure out."""
