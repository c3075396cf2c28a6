"""The streams of tasks, and the images they are cut from."""
