"""An HTTP client for one remote registry, as a Registry."""
