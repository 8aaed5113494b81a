"""Holds every row of Tables 1 and 2 of the QeRL paper (arXiv 2510.11696) as a recipe."""
