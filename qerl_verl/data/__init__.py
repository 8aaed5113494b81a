"""Prepares data sets in the form that verl reads."""
