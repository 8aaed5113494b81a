"""Dotted keys, and who wrote them."""

from qerl_verl.config.keys import override_keys


def test_keys_of_overrides():
    assert override_keys(["+a.b=1", "++c=2", "~d", "e.f='x=y'"]) == {"a.b", "c", "d", "e.f"}
