"""A synthetic video domain whose prompts can be read back from the pixels, and the tiny WAN and VAE that know it."""
