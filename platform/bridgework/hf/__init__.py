"""Import from and export to Hugging Face transformers: one module per model family."""
