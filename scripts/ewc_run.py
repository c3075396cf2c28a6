#!python
"""The command of an editable install, for the completion of shells: docs/command_line.md."""

from experiments.run import main

main()
