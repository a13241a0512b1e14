"""The processes of a server: supervisor, server process, housekeeping."""
