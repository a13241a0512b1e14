"""The configuration: its values, its schema, how it is read from a file."""
