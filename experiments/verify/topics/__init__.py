"""A module a topic: its figures, against bars that stand in it, and its picture."""
