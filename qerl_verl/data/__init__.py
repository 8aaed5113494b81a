"""Data sets in the form that verl reads."""
