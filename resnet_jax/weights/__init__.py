"""Reading and writing other frameworks' weights: one naming scheme a file."""
