"""Exports a checkpoint of a run for other programs: the adapter alone, or a merged model."""
