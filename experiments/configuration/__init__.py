"""From a command line to a configuration that has been checked, and to the objects it names."""
