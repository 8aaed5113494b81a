"""Prints the lines with which QeRL speaks to the user in verl's log.

The module can be imported without torch, verl or vLLM.
"""


def say(text: str) -> None:
    """Prints one line at once, so that it keeps its place among those of other processes."""
    print(f"[qerl] {text}", flush=True)
