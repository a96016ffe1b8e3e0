"""Pictures of a run: its curves and a sample of its predictions."""
