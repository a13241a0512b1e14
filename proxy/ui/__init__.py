"""The web page on the admin listener: its screens, sessions and charts."""
