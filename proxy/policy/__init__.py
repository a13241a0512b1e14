"""What may be served: rules, and the conditions that content has to meet."""
