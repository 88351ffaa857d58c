"""Which images of a conversation a prompt shows: all before its turn, or those that the template keeps."""

from __future__ import annotations

from collections.abc import Sequence

from ..images.conversation_images import ConversationImages
from .conversation import Message, RenderingError
from .prefixes import Prefixes
from .turn import RenderedTurn, rendering_error
from .validation import is_image_part


_MARKER = "Xqimage{}qx"


def find_shown_images(prefixes: Prefixes, turn: RenderedTurn, images: ConversationImages) -> list[int]:
    """
    Return which image of its conversation each placeholder in the prompt of a turn shows, or refuse the turn.

    Where a prompt has a placeholder for each image of its messages, these are all of them, in order. Where it has
    fewer, the template drops images. Markers beside the images show which; where a template does not write them, these
    are the images without which it renders the same prompt, or, if it writes something in their place, a prompt with
    as many placeholders.
    """
    placeholders, k = images.placeholders, turn.message_index

    def refused(reason: str) -> RenderingError:
        return rendering_error(prefixes.template, k, reason)

    places = _places(prefixes.messages[:k])
    count = placeholders.count(turn.prompt)
    if _places([prefixes.messages[k]]) or placeholders.count(turn.completion):
        raise refused(
            "it shows an image, which a model that writes text does not write. Put the image in a message of the user "
            "or of a tool"
        )
    if count > len(places):
        raise refused(
            f"its prompt has {count} placeholders {placeholders.text!r} for {len(places)} images. Does a text contain "
            "the placeholder? Write it in another way"
        )
    if count == len(places):
        return list(range(count))
    shown = _find_kept(prefixes, turn, places, images)
    if shown is None:
        raise refused(
            f"the template shows {count} of the {len(places)} images before it, and which ones is not certain. Use a "
            "template that shows all of them, or give tokenised turns with the images of each"
        )
    for index, (message, _) in enumerate(places):
        is_new = all(other.get("role") != "assistant" for other in prefixes.messages[message:k])
        if is_new and index not in shown:
            role = prefixes.messages[message].get("role")
            raise refused(
                f"the template drops the image of message {message} ('{role}'). Use one that shows images in messages "
                "of this role"
            )
    return shown


def _find_kept(
    prefixes: Prefixes, turn: RenderedTurn, places: Sequence[tuple[int, int]], images: ConversationImages
) -> list[int] | None:
    count = images.placeholders.count(turn.prompt)
    marked = _find_marked(prefixes, turn, places, images)
    if marked is not None and len(marked) == count:
        return marked
    texts = [_prompt_without(prefixes, turn.message_index, place) for place in places]
    changing = [number for number, text in enumerate(texts) if text != turn.prompt]
    counted = [number for number in changing if images.placeholders.count(texts[number] or "") < count]
    return next((shown for shown in (changing, counted) if len(shown) == count), None)


def _find_marked(
    prefixes: Prefixes, turn: RenderedTurn, places: Sequence[tuple[int, int]], images: ConversationImages
) -> list[int] | None:
    """
    Return the images with a placeholder between the marker before them and their own; `None` if it is not certain.

    A marker is a text part right behind an image. A window of one screen over two writes "[earlier] Xqimage0qx" and
    "<image> Xqimage1qx": the second image is shown. Without its markers, the text must be the prompt.
    """
    messages = list(prefixes.messages[: turn.message_index])
    for number, (index, position) in reversed(list(enumerate(places))):
        content = list(messages[index]["content"])
        content.insert(position + 1, {"type": "text", "text": _MARKER.format(number)})
        messages[index] = {**messages[index], "content": content}
    rest = _render(prefixes, messages)
    if rest is None:
        return None
    shown, plain = [], ""
    for number in range(len(places)):
        before, marker, after = rest.partition(_MARKER.format(number))
        if not marker:
            continue  # the template drops more than the image
        if images.placeholders.count(before) > 1:
            return None
        shown += [number] * images.placeholders.count(before)
        plain, rest = plain + before, after
    return shown if plain + rest == turn.prompt else None


def without_image_parts(content: object) -> object:
    """Return the content of a message without its images."""
    return [part for part in content if not is_image_part(part)] if isinstance(content, list) else content


def _places(messages: Sequence[Message]) -> list[tuple[int, int]]:
    """Return message and part of each image."""
    return [
        (index, position)
        for index, message in enumerate(messages)
        if isinstance(message.get("content"), list)
        for position, part in enumerate(message["content"])
        if is_image_part(part)
    ]


def _prompt_without(prefixes: Prefixes, k: int, place: tuple[int, int]) -> str | None:
    """Return the prompt of message `k` without one image, `None` if the template refuses it."""
    index, position = place
    messages = list(prefixes.messages[:k])
    content = messages[index]["content"]
    messages[index] = {**messages[index], "content": [*content[:position], *content[position + 1 :]]}
    return _render(prefixes, messages)


def _render(prefixes: Prefixes, messages: list[Message]) -> str | None:
    try:
        return prefixes.template.render(messages, add_generation_prompt=True)
    except RenderingError:
        return None
