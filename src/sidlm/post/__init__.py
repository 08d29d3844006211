"""What turns a language model into an assistant: the chat format and tool calls."""
