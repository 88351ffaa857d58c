"""
Write the demo's conversations: arithmetic over several turns, with and without tools.

Every assistant message carries `reasoning_content`; later turns build on the answers, never on the reasoning, of
earlier ones, as in real conversations with reasoning models. The output depends on nothing but `SEED`:

    python -m demo.make_data
"""

import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random
from typing import Any

from trl_singlepass.cli.demo import DATA


SEED = 2504
NUM_CONVERSATIONS = 240
MIN_TURNS, MAX_TURNS = 3, 12

Message = dict[str, Any]
# One exchange: the user's message, and everything that the assistant and its tools add before the next one.
Exchange = list[Message]

PRICES = {"notebook": "3.50", "pen": "1.20", "folder": "2.75", "ruler": "0.90", "stapler": "8.40", "lamp": "24.00"}
UNITS = {
    # one, many: factor, target, symbol
    ("mile", "miles"): ("1.609", "kilometres", "km"),
    ("pound", "pounds"): ("0.454", "kilograms", "kg"),
    ("gallon", "gallons"): ("3.785", "litres", "l"),
    ("inch", "inches"): ("2.54", "centimetres", "cm"),
    ("ounce", "ounces"): ("28.35", "grams", "g"),
}
TOWNS = ["Ashford", "Brill", "Corby", "Dunmore", "Eltham", "Farley", "Garstang", "Hatton"]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "calculator",
            "description": "Evaluate an arithmetic expression.",
            "parameters": {
                "type": "object",
                "properties": {"expression": {"type": "string", "description": "For example 12 * 3.5"}},
                "required": ["expression"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Look up the price of an item or the size of a unit.",
            "parameters": {
                "type": "object",
                "properties": {
                    "table": {"type": "string", "enum": ["prices", "units"]},
                    "key": {"type": "string"},
                },
                "required": ["table", "key"],
            },
        },
    },
]


def number(value: Fraction) -> str:
    """Format a number with at most three decimals, as the assistant writes it."""
    return f"{float(value):.3f}".rstrip("0").rstrip(".")


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def answer(reasoning: str, content: str) -> Message:
    return {"role": "assistant", "reasoning_content": reasoning, "content": content}


def call(reasoning: str, name: str, result: str, **arguments: str) -> list[Message]:
    tool_call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return [
        {"role": "assistant", "reasoning_content": reasoning, "content": "", "tool_calls": [tool_call]},
        {"role": "tool", "name": name, "content": result},
    ]


def calculate(reasoning: str, left: Fraction, sign: str, right: Fraction) -> list[Message]:
    results = {"+": left + right, "-": left - right, "*": left * right}
    expression = f"{number(left)} {sign} {number(right)}"
    return call(reasoning, "calculator", number(results[sign]), expression=expression)


def shopping(random: Random) -> Iterator[Exchange]:
    """A growing shopping list: the price from the table, the product from the calculator, the sum in the reasoning."""
    total = Fraction(0)
    for item in random.sample(sorted(PRICES), len(PRICES)):
        count, price = random.randint(2, 12), Fraction(PRICES[item])
        cost = count * price
        requests = [f"I need {count} {item}s. What do they cost?", f"Add {count} {item}s, please."]
        exchange = [user(random.choice(requests))]
        exchange += call(
            f"The user wants {count} {item}s. I do not know the price of a {item}, so I look it up in the table.",
            "lookup", number(price), table="prices", key=item,
        )  # fmt: skip
        exchange += calculate(
            f"One {item} costs {number(price)}. For {count} of them I multiply {count} by {number(price)}.",
            Fraction(count), "*", price,
        )  # fmt: skip
        exchange += [
            answer(
                f"{count} times {number(price)} is {number(cost)}. Before this the list came to {number(total)}. "
                f"Adding both, {number(total)} + {number(cost)} = {number(total + cost)}. I give cost and new total.",
                f"{count} {item}s cost {number(cost)}. Your list now comes to {number(total + cost)}.",
            )
        ]
        total += cost
        yield exchange
        budget = Fraction(random.randint(1, 12) * 20)
        yield [user(f"Do I have enough with {number(budget)}?"), _compare(total, budget)]


def _compare(total: Fraction, budget: Fraction) -> Message:
    rest = budget - total
    reasoning = f"The list comes to {number(total)} and the user has {number(budget)}. "
    if rest >= 0:
        reasoning += f"{number(budget)} - {number(total)} = {number(rest)}, which is not negative, so it is enough."
        return answer(reasoning, f"Yes. After paying {number(total)} you have {number(rest)} left.")
    reasoning += f"{number(total)} is more than {number(budget)}; {number(-rest)} is missing, so it is not enough."
    return answer(reasoning, f"No. You are {number(-rest)} short.")


def conversion(random: Random) -> Iterator[Exchange]:
    """Unit conversions: the factor comes from the table once per unit, and from the conversation after that."""
    known: set[str] = set()
    while True:
        (unit, units), amount = random.choice(sorted(UNITS)), Fraction(random.randint(2, 60))
        text, name, short = UNITS[unit, units]
        factor = Fraction(text)
        questions = [f"How many {name} are {amount} {units}?", f"Convert {amount} {units} to {name}."]
        exchange = [user(random.choice(questions))]
        if unit not in known:
            exchange += call(
                f"To convert {units} to {name} I need the size of one {unit}. I look it up in the table of units.",
                "lookup", f"{text} {short}", table="units", key=unit,
            )  # fmt: skip
        known.add(unit)
        result = amount * factor
        tens, ones = amount // 10 * 10, amount % 10
        reasoning = (
            f"One {unit} is {text} {short}. I split {amount} into {tens} and {ones}. "
            f"{tens} times {text} is {number(tens * factor)}, {ones} times {text} is {number(ones * factor)}. "
            f"Together that is {number(result)}."
        )
        content = f"{amount} {units} are {number(result)} {short} (one {unit} is {text} {short})."
        exchange += [answer(reasoning, content)]
        yield exchange


def running_number(random: Random) -> Iterator[Exchange]:
    """Mental arithmetic on one number that every turn changes."""
    value = random.randint(10, 60)
    yield [
        user(f"Let us play with a number. Start with {value}."),
        answer(f"The user sets the start to {value}. I confirm it and wait.", f"The number is {value}."),
    ]
    while True:
        operation, operand = random.choice(["add", "subtract", "double", "halve"]), random.randint(5, 90)
        request, working, new = _operation(operation, value, operand)
        yield [
            user(request),
            answer(f"The number is {value} now. {working} So the number becomes {new}.", f"The number is {new}."),
        ]
        value = new


def _operation(operation: str, value: int, operand: int) -> tuple[str, str, int]:
    if operation == "add":
        tens, ones = operand // 10 * 10, operand % 10
        working = f"{value} + {tens} = {value + tens}, and {ones} more is {value + operand}."
        return f"Add {operand}.", working, value + operand
    if operation == "subtract" and operand <= value:
        return f"Take away {operand}.", f"{value} - {operand} = {value - operand}.", value - operand
    if operation == "halve" and value % 2 == 0:
        return "Halve it.", f"{value} is even. Half of {value} is {value // 2}.", value // 2
    return "Double it.", f"Twice {value} is {value} + {value} = {2 * value}.", 2 * value


def table(random: Random) -> Iterator[Exchange]:
    """Questions about a small table in the first message."""
    towns = random.sample(TOWNS, 5)
    people = {town: random.randint(10, 99) * 100 for town in towns}
    lines = "\n".join(f"| {town} | {count} |" for town, count in people.items())
    intro = f"Here is a table of towns.\n| town | people |\n|---|---|\n{lines}\n"
    while True:
        first, second = random.sample(towns, 2)
        question, messages = _table_question(random, people, first, second)
        yield [user(intro + question), *messages]
        intro = ""


def _table_question(random: Random, people: dict[str, int], first: str, second: str) -> tuple[str, list[Message]]:
    kind = random.choice(["largest", "difference", "sum"])
    a, b = people[first], people[second]
    if kind == "largest":
        best = max(people, key=lambda town: people[town])
        listed = ", ".join(f"{town} {count}" for town, count in people.items())
        reasoning = f"I compare all counts: {listed}. The largest is {people[best]}, which belongs to {best}."
        return "Which town is the largest?", [answer(reasoning, f"{best}, with {people[best]} people.")]
    if kind == "sum":
        reasoning = f"The table gives {a} for {first} and {b} for {second}. I add them with the calculator."
        closing = f"The calculator says {a + b}, the number of people in {first} and {second} together."
        question = f"How many people live in {first} and {second} together?"
        content = f"{first} and {second} have {a + b} people together."
        return question, [*calculate(reasoning, Fraction(a), "+", Fraction(b)), answer(closing, content)]
    bigger, smaller = (first, second) if a >= b else (second, first)
    reasoning = (
        f"{first} has {a} people and {second} has {b}. The larger one is {bigger}. "
        f"{max(a, b)} - {min(a, b)} = {abs(a - b)}."
    )
    content = f"{bigger} has {abs(a - b)} more people than {smaller}."
    return f"Compare {first} with {second}.", [answer(reasoning, content)]


SCENES: list[tuple[str, Callable[[Random], Iterator[Exchange]], bool]] = [
    ("You help in a stationery shop. Use the tools for prices and products.", shopping, True),
    ("You convert units. Look up every factor that you have not been told yet.", conversion, True),
    ("You do mental arithmetic, one step at a time.", running_number, False),
    ("You answer questions about tables. Use the calculator for sums.", table, True),
]


def conversation(random: Random, scene: int) -> dict[str, Any]:
    """Return one example with between `MIN_TURNS` and `MAX_TURNS` assistant messages."""
    system, exchanges, uses_tools = SCENES[scene]
    messages: list[Message] = [{"role": "system", "content": system}]
    wanted, turns = random.randint(MIN_TURNS, MAX_TURNS), 0
    for exchange in exchanges(random):
        turns += sum(message["role"] == "assistant" for message in exchange)
        if turns > MAX_TURNS:
            break
        messages += exchange
        if turns >= wanted:
            break
    return {"messages": messages, **({"tools": TOOLS} if uses_tools else {})}


def main() -> None:
    random = Random(SEED)
    rows = [conversation(random, index % len(SCENES)) for index in range(NUM_CONVERSATIONS)]
    DATA.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
