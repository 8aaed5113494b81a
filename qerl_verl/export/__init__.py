"""From a checkpoint of a run to what other programs load: the adapter alone, or a merged model."""
