"""The gateway: vLLM's OpenAI front ends for every deployment, over engines that are elsewhere. It has no GPU."""
