"""Hugging Face in and out: one module a family of models, which says what is called what on either side."""
