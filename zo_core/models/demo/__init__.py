"""The bundled demo model: weights, tokenizer, card and the script that trained it."""
