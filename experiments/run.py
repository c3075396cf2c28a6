"""The command line: ``python -m experiments.run [option=value ...]``."""

from experiments.training.stop import AtOnce


def main() -> None:
    """Run the command line; a wrong option or a signal gives a short message, not a traceback."""
    with AtOnce():
        # Imported here, as a signal may come while the imports last.
        from experiments.job import command

        command()


if __name__ == "__main__":
    main()
