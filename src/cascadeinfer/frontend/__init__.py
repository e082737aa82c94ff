"""HTTP: vLLM's own OpenAI server on our engine client, plus the admin routes."""
