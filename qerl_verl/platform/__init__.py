"""verl's platform interface for machines without an accelerator."""
