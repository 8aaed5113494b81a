"""A reward that a random model can earn: the share of digits among eight characters."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(c.isdigit() for c in solution_str) / 8
