"""From a loaded model to text: the decoding loop, JSON-constrained output, and an OpenAI-compatible server."""
