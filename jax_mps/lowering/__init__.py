"""How a primitive becomes code; `rule.py` chooses the path."""
