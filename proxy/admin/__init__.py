"""What an operator may ask and order, and the HTTP API for that."""
