"""The nouns everyone shares. Standard library and pydantic only; torch for typing only."""
