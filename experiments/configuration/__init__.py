"""The command line, checked configurations, and the objects that they name."""
