"""The block of one layer: Kronecker, eigenvalue-corrected, by leading eigenvectors."""
