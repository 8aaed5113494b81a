"""Rewards that a random model can earn: shares of digits and of letters among eight characters."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(c.isdigit() for c in solution_str) / 8


def letter_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(c.isalpha() for c in solution_str) / 8
