"""Look at what a model does on text, and keep the numbers later stages need."""
