"""Models that the study runs on, with the settings that fit them."""
