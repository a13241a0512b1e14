"""Who a client is, and what that client may do."""
