"""The processes: supervisor, server process, housekeeping."""
