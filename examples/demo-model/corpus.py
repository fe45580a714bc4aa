"""What the demo model learns from: Python's documentation and chats.

The documentation is `pydoc_data.topics`, the text behind Python's own `help()`, which every CPython brings
along (PSF-2.0). The chats are of three kinds: questions about that documentation, the hand-written pairs in
`chats.json`, and generated conversations in which a tool is called.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

Message = dict[str, Any]

WRITTEN_CHATS = Path(__file__).with_name("chats.json")

PROSE_LINE = 50  # Documentation wraps prose at about 70 columns; code rarely has only lines this long.
ANSWER_CHARS = 240  # Long enough for two or three sentences, short enough to be learnt to its end.
SYSTEM_SHARE = 0.25
TOOL_SHARE = 0.15
WRITTEN_SHARE = 0.6
AS_WRITTEN_SHARE = 0.5
LOWER_CASE_SHARE = 0.3
PLAIN_TURNS_WITH_TOOLS = 0.2
MOST_TOOL_TURNS = 3

TOPIC_QUESTIONS = (
    "What is {}?",
    "What is {} in Python?",
    "Tell me about {}.",
    "Explain {} in Python.",
    "How does {} work in Python?",
    "Help on {}",
)
METHOD_QUESTIONS = ("What does {} do?", "What is {}?", "Explain {}.", "How do I use {}?", "Help on {}")

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful, honest and concise assistant.",
    "You are a friendly assistant. Answer briefly.",
    "Answer the question of the user.",
    "You are the sllm demo model.",
    "Be polite and keep your answers short.",
    "You are an expert in Python.",
)

TYPING_STYLES = (
    "{}",
    "Hello! {}",
    "Please tell me: {}",
    "{} Please answer in one sentence.",
    "{} Thanks!",
)

FILLERS = {"a", "an", "are", "do", "does", "I", "in", "is", "me", "of", "the"}

CITIES = (
    "Amsterdam", "Berlin", "Boston", "Cairo", "Chicago", "Dublin", "Helsinki", "Lima", "Lisbon", "London",
    "Madrid", "Oslo", "Paris", "Prague", "Rome", "Seattle", "Sydney", "Tokyo", "Vienna", "Zurich",
)  # fmt: skip
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
NUMBERS = tuple(f"{number:02}" for number in (*range(5, 31), *range(35, 60, 5)))
# What a tool conversation copies from one turn to the next. Few words, so that each can be one token: the model
# then only has to find them, not to spell them.
COPIED_WORDS = CITIES + SKIES + NUMBERS


@dataclass(frozen=True)
class Chat:
    """One answer, and the ways of asking for it."""

    questions: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class ToolUse:
    """One question that needs a tool, from the question to the final answer."""

    question: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    answer: str


@dataclass(frozen=True)
class Tool:
    schema: dict[str, Any]
    use: Callable[[random.Random], ToolUse]


# Documentation


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a documentation text, prose unwrapped, without the lines that underline titles."""
    blocks = re.split(r"\n\s*\n", re.sub(r"(?m)^[*=\-~^]{3,}$\n?", "", text.strip()))
    return [unwrapped(block) for block in blocks if block.strip()]


def unwrapped(block: str) -> str:
    lines = block.strip().splitlines()
    is_prose = all(len(line) >= PROSE_LINE for line in lines[:-1])
    return one_line(block) if is_prose else "\n".join(line.rstrip() for line in lines)


def one_line(block: str) -> str:
    line = re.sub(r"\s+", " ", block.strip())
    return re.sub(r"(?<=\w)- (?=\w)", "-", line)  # A line may have ended inside a word such as "non-empty".


def documentation() -> list[str]:
    return ["\n\n".join(paragraphs(text)) + "\n" for _, text in sorted(topics.items())]


def first_sentences(text: str) -> str:
    """As many whole sentences from the beginning of a text as fit an answer, without their emphasis marks."""
    plain = re.sub(r"\*(\w[\w ]*)\*", r"\1", one_line(text))
    first, *rest = re.split(r"(?<=[.:])\s+(?=[A-Z])", plain)
    answer = re.sub(r":$", ".", first)
    for sentence in rest:
        # A colon leads over to a list or to code, which the answer does not have.
        if sentence.endswith(":") or len(answer) + len(sentence) > ANSWER_CHARS:
            break
        answer += f" {sentence}"
    return answer


def is_explanation(paragraph: str) -> bool:
    """Whether a paragraph can stand as an answer: a sentence, not grammar, code or a list item."""
    return bool(re.match(r'["A-Z][^\n]{40,}[.:]$', paragraph)) and not re.search(r"::=|>>>", paragraph)


def topic_chats() -> list[Chat]:
    chats = []
    for name, text in sorted(topics.items()):
        title, *body = paragraphs(text)
        explanation = next((paragraph for paragraph in body if is_explanation(paragraph)), None)
        if explanation is None:
            continue
        subject = re.sub(r'^the | statements?$| (—|\().*|["*]', "", title.splitlines()[0].lower()).strip()
        names = sorted({name, subject})
        questions = tuple(template.format(each) for each in names for template in TOPIC_QUESTIONS)
        chats.append(Chat(questions, first_sentences(explanation)))
    return chats


def method_chats() -> list[Chat]:
    """Chats about the methods that the documentation describes one by one, such as `str.join`."""
    signature = r"(?P<owner>[a-z]+)\.(?P<name>\w+)\(.*\)\n"
    more_signatures = r"(?:[a-z]+\.\w+\(.*\)\n)*"
    entry = re.compile(rf"(?m)^{signature}{more_signatures}\n(?P<body>(?:   .*\n)+)")
    answers: dict[str, str] = {}
    for _, text in sorted(topics.items()):
        for match in entry.finditer(text):
            owner = "" if match["owner"] == "object" else f"{match['owner']}."
            answers.setdefault(owner + match["name"], first_sentences(match["body"]))
    return [
        Chat(tuple(template.format(name) for template in METHOD_QUESTIONS), answer) for name, answer in answers.items()
    ]


def written_chats() -> list[Chat]:
    pairs = json.loads(WRITTEN_CHATS.read_text(encoding="utf-8"))
    return [Chat(tuple(pair["ask"]), pair["answer"]) for pair in pairs]


def python_chats() -> list[Chat]:
    """The chats about the documentation, less the questions for which there is a hand-written answer."""
    taken = {question.lower() for chat in written_chats() for question in chat.questions}
    chats = []
    for chat in topic_chats() + method_chats():
        questions = tuple(question for question in chat.questions if question.lower() not in taken)
        taken.update(question.lower() for question in questions)
        if questions:
            chats.append(Chat(questions, chat.answer))
    return chats


# Tools


def schema(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """A tool definition as the OpenAI API has it; `parameters` maps each parameter to its JSON type."""
    properties = {parameter: {"type": kind} for parameter, kind in parameters.items()}
    declared = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name, "description": description, "parameters": declared}
    return {"type": "function", "function": function}


def weather(rng: random.Random) -> ToolUse:
    city, sky, degrees = rng.choice(CITIES), rng.choice(SKIES), rng.randint(10, 30)
    questions = ("What is the weather in {}?", "How is the weather in {}?", "What's the weather like in {}?")
    return ToolUse(
        rng.choice(questions).format(city),
        {"city": city},
        {"temperature": degrees, "sky": sky},
        f"It is {sky} in {city}, with a temperature of {degrees} degrees.",
    )


def local_time(rng: random.Random) -> ToolUse:
    city, time = rng.choice(CITIES), f"{rng.randint(5, 23):02}:{rng.randrange(5, 60, 5):02}"
    questions = ("What time is it in {}?", "Tell me the time in {}.", "What is the local time in {}?")
    return ToolUse(
        rng.choice(questions).format(city),
        {"city": city},
        {"time": time},
        f"It is {time} in {city}.",
    )


def timer(rng: random.Random) -> ToolUse:
    minutes = rng.randrange(10, 60, 5)
    questions = ("Set a timer for {} minutes.", "Wake me in {} minutes.", "Start a timer of {} minutes.")
    return ToolUse(
        rng.choice(questions).format(minutes),
        {"minutes": minutes},
        {"status": "started"},
        f"The timer is set for {minutes} minutes.",
    )


TOOLS = (
    Tool(schema("get_weather", "Get the weather of a city", city="string"), weather),
    Tool(schema("get_time", "Get the local time of a city", city="string"), local_time),
    Tool(schema("set_timer", "Start a timer", minutes="integer"), timer),
)


# Conversations


class ConversationWriter:
    """Draws random conversations; the same seed gives the same ones."""

    def __init__(self, written: Sequence[Chat], python: Sequence[Chat], seed: int) -> None:
        self._written = [(question, chat.answer) for chat in written for question in chat.questions]
        self._python = [(question, chat.answer) for chat in python for question in chat.questions]
        self._rng = random.Random(seed)

    def conversation(self) -> Conversation:
        system = self._system()
        if self._rng.random() < TOOL_SHARE:
            return self._tool_conversation(system)
        # Many conversations have one turn, since most users of a demo ask one question.
        turns = self._rng.choices((1, 2, 3, 5), weights=(6, 2, 1, 1))[0]
        return Conversation(system + [message for _ in range(turns) for message in self._plain_turn()])

    def _system(self) -> list[Message]:
        if self._rng.random() >= SYSTEM_SHARE:
            return []
        return [{"role": "system", "content": self._rng.choice(SYSTEM_PROMPTS)}]

    def _plain_turn(self) -> list[Message]:
        pairs = self._written if self._rng.random() < WRITTEN_SHARE else self._python
        question, answer = self._rng.choice(pairs)
        return [
            {"role": "user", "content": self._as_typed(question)},
            {"role": "assistant", "content": answer},
        ]

    def _as_typed(self, question: str) -> str:
        """The question as different users type it, so that the answer hangs on the words that matter."""
        if self._rng.random() < AS_WRITTEN_SHARE:
            return question
        style = self._rng.choice(TYPING_STYLES)
        if style == "{}":
            question = " ".join(word for word in question.split() if word not in FILLERS)
        typed = style.format(question)
        return typed.lower() if self._rng.random() < LOWER_CASE_SHARE else typed

    def _tool_conversation(self, system: list[Message]) -> Conversation:
        tools = self._rng.sample(TOOLS, self._rng.randint(1, len(TOOLS)))
        messages = list(system)
        for _ in range(self._rng.randint(1, MOST_TOOL_TURNS)):
            if self._rng.random() < PLAIN_TURNS_WITH_TOOLS:
                messages += self._plain_turn()
            else:
                messages += self._tool_turn(self._rng.choice(tools))
        return Conversation(messages, [tool.schema for tool in tools])

    def _tool_turn(self, tool: Tool) -> list[Message]:
        use = tool.use(self._rng)
        function = {"name": tool.schema["function"]["name"], "arguments": use.arguments}
        return [
            {"role": "user", "content": use.question},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
            {"role": "tool", "content": json.dumps(use.result)},
            {"role": "assistant", "content": use.answer},
        ]
