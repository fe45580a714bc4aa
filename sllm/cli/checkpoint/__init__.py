"""`sllm checkpoint`: one file per verb."""
