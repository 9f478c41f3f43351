"""Option files: composing, checking and documenting them."""
