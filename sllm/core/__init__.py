"""The nouns of sllm: frozen values and enums that all other packages share. Nothing here acts."""
