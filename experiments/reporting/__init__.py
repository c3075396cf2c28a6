"""What is made of results: pictures, tables, and the pages over sweeps."""
