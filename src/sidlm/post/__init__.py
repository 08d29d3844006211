"""What makes an assistant of a language model: chat format, tool calls, and what Llama 3's recipe adds to TRL.

`preference.py` needs the extra ``post`` (trl, peft, datasets, accelerate).
"""
