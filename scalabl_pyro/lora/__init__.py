"""LoRA layers inside a module, and the LLM as a function of the latents s (torch and PEFT only)."""
