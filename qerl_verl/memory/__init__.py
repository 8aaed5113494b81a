"""What a run takes of GPU and host memory, worked out from its configuration (``qerl plan``)."""
