"""The inference transformer: Qwen3 and Llama by configuration, attention over segments, KV cache, weights."""
