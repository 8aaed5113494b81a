"""Shares one copy of the frozen base between two processes of one device.

The package has the memory, its layout, and the channel to the second process. It imports neither
verl nor vLLM.
"""
