"""The report over any set of runs: one page that opens anywhere, pictures and tables."""
