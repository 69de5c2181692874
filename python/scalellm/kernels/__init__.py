"""One folder per operation: reference.py in torch, and faster ones beside it."""
