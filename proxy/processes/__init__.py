"""The processes of one server: what each says of itself, and how it asks all of them."""
