"""What keeps a store small and sound: eviction, collection, scrub, pins, usage."""
