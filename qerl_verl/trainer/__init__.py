"""verl's V1 trainers with the noise schedule."""
