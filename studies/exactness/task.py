"""
Conversations with one correct answer per turn, which mostly depends on the previous answer.

The first message contains a table of values. Every question adds a digit to an item of the table or to the last
answer, and asks for the last digit of the sum. The reasoning recalls the value and adds:

    user       cup=3,pen=8,hat=1       last+4
               pen+4
    reasoning  8+4=12                  2+4=06
    answer     2                       6
"""

from collections.abc import Sequence
from random import Random
from typing import Any


ITEMS = ("cup", "pen", "hat")
LAST = "last"
# Share of questions, from the second on, about the last answer rather than the table.
HISTORY_SHARE = 0.6
ADDENDS = range(5)
TURNS = range(3, 9)

Conversation = dict[str, list[dict[str, str]]]


def conversation(random: Random, turns: int) -> Conversation:
    """Return one example with this many questions, reasonings and answers."""
    values = {item: random.randrange(10) for item in ITEMS}
    text, messages = ",".join(f"{item}={value}" for item, value in values.items()) + "\n", []
    for _ in range(turns):
        asks_history = LAST in values and random.random() < HISTORY_SHARE
        name, addend = LAST if asks_history else random.choice(ITEMS), random.choice(ADDENDS)
        total = values[name] + addend
        messages += [
            {"role": "user", "content": f"{text}{name}+{addend}"},
            {
                "role": "assistant",
                "reasoning_content": f"{values[name]}+{addend}={total:02d}",
                "content": str(total % 10),
            },
        ]
        values[LAST], text = total % 10, ""
    return {"messages": messages}


def conversations(seed: int, count: int, turns: range = TURNS) -> list[Conversation]:
    """Return examples that depend only on the arguments."""
    random = Random(seed)
    return [conversation(random, random.choice(turns)) for _ in range(count)]


def answers(row: Conversation) -> list[str]:
    """Return the correct answers of a conversation, by turn."""
    return [message["content"] for message in row["messages"] if message["role"] == "assistant"]


def texts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return all texts in the conversations."""
    return [message[part] for row in rows for message in row["messages"] for part in message if part != "role"]
