"""The operations, one file a family, and what their primitives share."""
