"""What happens here, told to other servers: queue, formats, delivery."""
