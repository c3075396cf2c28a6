"""The Cramer-Rao bound."""
