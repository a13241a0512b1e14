"""What an operator can see and do, and the HTTP API for that."""
