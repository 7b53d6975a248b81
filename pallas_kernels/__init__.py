"""Attention behind plain array functions, each implementation in one file. Knows no model, no tree, no request."""
