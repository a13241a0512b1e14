"""Which Registry serves which name; how the configuration becomes them."""
