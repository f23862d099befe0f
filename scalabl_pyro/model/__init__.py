"""The Pyro model: latents, the LLM, and the likelihood of a data set."""
