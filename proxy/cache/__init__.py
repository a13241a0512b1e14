"""A Registry that answers from a store and fills it from an origin."""
