"""Machines without an accelerator for verl, and what a job needs and leaves on a host."""
