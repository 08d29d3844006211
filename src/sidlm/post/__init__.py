"""Post-training: what Llama 3's recipe adds to TRL. It needs the extra ``post`` (trl, peft, datasets, accelerate)."""
