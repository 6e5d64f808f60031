"""What Python runs at its start, where it is asked to: it imports this package with transformers, and not before."""
