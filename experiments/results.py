"""RESULTS.md from kept results: ``python -m experiments.results``."""

from experiments.reporting.results_page import main

if __name__ == "__main__":
    main()
