"""Trains the demo checkpoint: a byte-level BPE tokenizer and a Llama of 3.7 million parameters, on a CPU.

    python examples/demo-model/train.py --output examples/demo-model

Needs torch, transformers, tokenizers and safetensors. The same seed, versions and number of threads give the same
weights; everything that the model reads comes with Python or lies beside this file (see `corpus.py`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from corpus import COPIED_WORDS, Conversation, ConversationWriter, Message, documentation, python_chats, written_chats
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = 2048
CONTEXT = 4096
END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
# Single tokens for the markers that parsers of tool calls and of reasoning look up in a vocabulary. They are not
# "special", so that they stay in the decoded text, where those parsers need them.
MARKERS = ("<tool_call>", "</tool_call>", "<think>", "</think>")

# ChatML with tools in the style of the Hermes models. vLLM hands over a tool call's arguments as an object, other
# callers as a string of JSON: both must render alike.
CHAT_TEMPLATE = """\
{%- macro turn_start(role) -%}
{{- '<|im_start|>' + role + '\\n' -}}
{%- endmacro -%}
{%- set turns = messages -%}
{%- if tools -%}
{{- turn_start('system') -}}
{%- if messages[0].role == 'system' -%}
{{- messages[0].content + '\\n\\n' -}}
{%- set turns = messages[1:] -%}
{%- endif -%}
{{- 'You can call these functions:\\n<tools>\\n' -}}
{%- for tool in tools -%}
{{- (tool.function if tool.function is defined else tool) | tojson + '\\n' -}}
{%- endfor -%}
{{- '</tools>\\nTo call one, write its name and its arguments as JSON:\\n<tool_call>\\n' -}}
{{- '{"name": ..., "arguments": ...}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
{{- turn_start(message.role) -}}
{%- if message.role == 'tool' -%}
{{- '<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- else -%}
{{- message.content or '' -}}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function is defined else call -%}
{%- set arguments = function.arguments -%}
{{- '\\n' if message.content or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": ' + function.name | tojson + ', "arguments": ' -}}
{{- arguments if arguments is string else arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- turn_start('assistant') -}}
{%- endif -%}
"""

SEED = 0
STEPS = 1300
WARMUP_STEPS = 40
LEARNING_RATE = 3e-3
FINAL_LEARNING_RATE = 1e-4
TOKENS_PER_STEP = 4096
WINDOW = 256
LONG_WINDOW = 1024
LONG_EVERY = 4  # Every fourth step reads long windows, so that long chats do not leave the trained positions.
CONVERSATIONS = 12_000
DOCUMENTATION_SHARE = 0.25
COPIED_REPEATS = 150  # Often enough for each of these words to become one token.
LOG_EVERY = 50

SAMPLE_QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What is Python?",
    "What is serverless?",
    "What is a GPU?",
    "What is a KV cache?",
    "Why is the sky blue?",
    "What is the capital of France?",
    "Tell me a joke.",
    "Write a poem.",
    "What is lambda?",
    "What does str.join do?",
    "Explain exceptions in Python.",
    "How do I cook pasta?",
)
ANSWER_TOKENS = 200


# Tokenizer


def chat_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def rendered(conversations: Iterable[Conversation]) -> list[str]:
    """The conversations as the chat template writes them: exactly what the model sees when it serves."""
    template_only = chat_tokenizer(Tokenizer(models.BPE()))
    return [
        template_only.apply_chat_template(each.messages, tools=each.tools or None, tokenize=False)
        for each in conversations
    ]


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKERS),
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The trainer would spend merges on the spelling of the tokens that never get split.
    unsplit = re.compile("|".join(map(re.escape, (END_OF_TEXT, TURN_START, TURN_END, *MARKERS))))
    tokenizer.train_from_iterator((unsplit.sub("\n", text) for text in texts), trainer)
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in MARKERS])
    return chat_tokenizer(tokenizer)


# Batches


class Windows:
    """Draws training windows from tokenised documents and chats, each of which ends with the end-of-text token."""

    def __init__(self, documents: list[list[int]], chats: list[list[int]], seed: int) -> None:
        self._documents = documents
        self._chats = chats
        self._rng = random.Random(seed)

    def batch(self, rows: int, length: int) -> Tensor:
        """Rows of `length` tokens and of the token that follows them."""
        return torch.tensor([self._window(length + 1) for _ in range(rows)])

    def _window(self, length: int) -> list[int]:
        if self._rng.random() >= DOCUMENTATION_SHARE:
            # Starts with a chat's first token, since a prompt starts at position 0 when the model serves.
            return self._filled([], self._chats, length)
        document = self._rng.choices(self._documents, weights=[len(each) for each in self._documents])[0]
        start = self._rng.choice((0, self._rng.randrange(len(document))))
        return self._filled(document[start:], self._documents, length)

    def _filled(self, tokens: list[int], pool: list[list[int]], length: int) -> list[int]:
        window = tokens
        while len(window) < length:
            window = window + self._rng.choice(pool)
        return window[:length]


def tokenised(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[list[int]]:
    # Documents may be longer than the context, which a tokenizer would warn about: windows cut them.
    return [tokenizer.encode(text + END_OF_TEXT, verbose=False) for text in texts]


# Model


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return warmup * (FINAL_LEARNING_RATE + (LEARNING_RATE - FINAL_LEARNING_RATE) * cosine)


def train(model: LlamaForCausalLM, windows: Windows, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.02, fused=True)
    started = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        length = LONG_WINDOW if step % LONG_EVERY == 0 else WINDOW
        loss = loss_of(model, windows.batch(TOKENS_PER_STEP // length, length))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
            mean = sum(recent) / len(recent)
            tokens = (step + 1) * TOKENS_PER_STEP
            seconds = time.monotonic() - started
            print(f"step {step + 1}/{steps}  loss {mean:.3f}  {tokens} tokens  {seconds:.0f} s", flush=True)
            recent.clear()


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


# Checkpoint


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    # Greedy by default; a base completion ends with the end of text, a chat answer with the end of the turn.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read what it writes.
    # In tokenizer_config.json, because not every reader of a checkpoint knows chat_template.jinja.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    name_tokenizer_class(folder / "tokenizer_config.json")


def name_tokenizer_class(config: Path) -> None:
    """Gives the tokenizer's class the name that transformers 4 knows as well as 5."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class Checkpoint:
    """The saved model, read back and run in float32 as the service runs it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(self, question: str) -> tuple[str, bool]:
        """The greedy answer, and whether it ended by itself."""
        messages: list[Message] = [{"role": "user", "content": question}]
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        with torch.inference_mode():
            output = self._model.generate(**prompt, max_new_tokens=ANSWER_TOKENS, do_sample=False)
        answer = output[0, prompt["input_ids"].shape[1] :].tolist()
        ended = answer[-1] in self._model.generation_config.eos_token_id
        return self._tokenizer.decode(answer, skip_special_tokens=True), ended


def report(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for question in SAMPLE_QUESTIONS:
        answer, ended = checkpoint.answer(question)
        print(f"\n> {question}\n{answer}{'' if ended else ' [cut off]'}")
    chats = written_chats()
    right = sum(checkpoint.answer(chat.questions[0]) == (chat.answer, True) for chat in chats)
    print(f"\n{right} of {len(chats)} hand-written answers are reproduced word for word")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    print(f"sha256 of model.safetensors: {digest}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo checkpoint of sllm.")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)

    writer = ConversationWriter(written_chats(), python_chats(), SEED)
    chat_texts = rendered(writer.conversation() for _ in range(CONVERSATIONS))
    documents = documentation()
    # A tenth of the chats is as much text as the documentation: neither crowds the other out of the vocabulary.
    copied = [f"{word} {word}" for word in COPIED_WORDS] * COPIED_REPEATS
    tokenizer = train_tokenizer(documents + chat_texts[: CONVERSATIONS // 10] + copied)
    windows = Windows(tokenised(tokenizer, documents), tokenised(tokenizer, chat_texts), SEED)
    model = new_model(tokenizer)
    print(f"{model.num_parameters()} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    train(model, windows, options.steps)
    save(model, tokenizer, options.output)
    report(options.output)


if __name__ == "__main__":
    main()
