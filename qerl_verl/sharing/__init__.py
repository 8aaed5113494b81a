"""One copy of the frozen base for two processes of one device: the memory, what lies where in it,
and how the second process gets it. Knows neither verl nor vLLM."""
