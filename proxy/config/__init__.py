"""The configuration: its values, its schema, and its loader."""
