"""The accuracy of K-FAC."""
