"""Short conversations to verify a model on: one turn, reasoning that the history drops, and no reasoning."""

from __future__ import annotations


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str, reasoning: str | None = None) -> dict[str, str]:
    message = {"role": "assistant", "content": text}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


CHATS = [
    [_user("How many days has a leap year?"), _assistant("A leap year has 366 days.")],
    [
        _user("What is 17 times 23?"),
        _assistant("17 times 23 is 391.", "17 times 20 is 340, 17 times 3 is 51, and the sum is 391."),
        _user("And half of that?"),
        _assistant("Half of 391 is 195.5.", "391 is odd, so the half has a fraction: 195.5."),
        _user("Is 391 a prime number?"),
        _assistant("No: it is 17 times 23.", "The first question gave its two factors, 17 and 23."),
    ],
    [
        _user("Name a river in France."),
        _assistant("The Loire."),
        _user("Where does it end?"),
        _assistant("In the Atlantic Ocean, near Saint-Nazaire."),
        _user("How long is it?"),
        _assistant("About a thousand kilometres."),
    ],
]
