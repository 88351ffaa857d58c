"""Conversations about screens, in every form in which datasets hold images."""

import base64
import io

import datasets

from support.tiny_vision import screen


IMAGES = [screen(1), screen(2, 32, 16), screen(3, 16, 24), screen(4)]


def user(*parts):
    """Return a user message of texts and images; `None` is an image that stands elsewhere."""
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    content = [{"type": kind, kind: part} for kind, part in zip(kinds, parts, strict=True)]
    return {"role": "user", "content": [{k: v for k, v in part.items() if v is not None} for part in content]}


def answer(text):
    """Return an answer."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


# One image, two of which one is shown before, and none.
CHAT = [
    user(IMAGES[0], "What do you see?"),
    answer("A screen."),
    user("And here: ", IMAGES[1], IMAGES[0], " or there?"),
    answer("Two more."),
    user("Good."),
    answer("Thanks."),
]
CHAT_IMAGES = [IMAGES[0], IMAGES[1], IMAGES[0]]


def images_of(messages):
    """Return the images of messages, in order."""
    return [part["image"] for message in messages for part in message["content"] if part.get("image") is not None]


def without_images(messages):
    """Return messages whose image parts are empty."""
    empty = [
        [{"type": "image"} if part["type"] == "image" else part for part in message["content"]] for message in messages
    ]
    return [{**message, "content": content} for message, content in zip(messages, empty, strict=True)]


def png(image):
    """Return an image as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def in_column(chats):
    """Return a dataset with a column of images and empty parts, as TRL documents it."""
    rows = [{"images": images_of(chat), "messages": without_images(chat)} for chat in chats]
    features = datasets.Dataset.from_list([{"messages": row["messages"]} for row in rows]).features
    features["images"] = datasets.List(datasets.Image())
    return datasets.Dataset.from_list(rows, features=features)


def _with_parts(chat, key, convert):
    parts = [
        [{"type": "image", key: convert(part["image"])} if part["type"] == "image" else part for part in m["content"]]
        for m in chat
    ]
    return [{**message, "content": content} for message, content in zip(chat, parts, strict=True)]


def forms(chat, folder):
    """Return `{name: dataset}`: one conversation in each form in which a dataset may hold its images."""
    paths = {}
    for image in images_of(chat):
        path = folder / f"{len(paths)}.png"
        if id(image) not in paths:
            image.save(path)
            paths[id(image)] = str(path)

    def encoded(image):
        return base64.b64encode(png(image)).decode()

    first, rest = chat[:1], chat[1:]
    split = {"prompt": without_images(first), "completion": without_images(rest), "images": images_of(chat)}
    url = _with_parts(chat, "image_url", lambda image: {"url": f"data:image/png;base64,{encoded(image)}"})
    for message in url:
        for part in message["content"]:
            part["type"] = "image_url" if part["type"] == "image" else part["type"]
    rows = {
        "column": {"images": images_of(chat), "messages": without_images(chat)},
        "column of bytes": {"images": [png(image) for image in images_of(chat)], "messages": without_images(chat)},
        "column of paths": {"images": [paths[id(i)] for i in images_of(chat)], "messages": without_images(chat)},
        "parts": {"messages": _with_parts(chat, "image", lambda image: image)},
        "parts of paths": {"messages": _with_parts(chat, "path", lambda image: paths[id(image)])},
        "parts of urls": {"messages": _with_parts(chat, "url", lambda image: paths[id(image)])},
        "parts of base64": {"messages": _with_parts(chat, "base64", encoded)},
        "OpenAI's parts": {"messages": url},
        "prompt and completion": split,
    }
    return {name: datasets.Dataset.from_list([row]) for name, row in rows.items()}
