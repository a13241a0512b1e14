"""The commands.  Reads arguments, calls one of the packages above, prints."""
