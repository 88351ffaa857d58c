"""Conversations with images become the tokens that a processor serves, and rows that refer to their images."""

import copy

import datasets
import PIL.Image
import pytest
import torch

from support.image_forms import (
    CHAT,
    CHAT_IMAGES,
    IMAGES,
    answer,
    forms,
    images_of,
    in_column,
    png,
    user,
    without_images,
)
from support.tiny_vision import FAMILIES, screen, tiny_processor
from trl_singlepass.data.bad_rows import BadRowError
from trl_singlepass.data.collator import DataCollatorForSinglePass
from trl_singlepass.data.conversations import example_to_rows, example_to_samples
from trl_singlepass.data.images import hide_image_columns, holds_images, take_images
from trl_singlepass.data.preparation import prepare_dataset
from trl_singlepass.data.settings import RowSettings
from trl_singlepass.images.loading import image_loader_of
from trl_singlepass.images.placeholders import placeholders_of
from trl_singlepass.images.reading import ImageReader
from trl_singlepass.trees.image_features import shown_images
from trl_singlepass.trees.rows import Row


def image_collator(load_images):
    """Return a collator for a model that reads pixels and nothing else."""
    return DataCollatorForSinglePass(0, load_images=load_images, image_reader=ImageReader((), None))


FORMS = [
    *("column", "column of bytes", "column of paths", "parts", "parts of paths", "parts of urls", "parts of base64"),
    *("OpenAI's parts", "prompt and completion"),
]


@pytest.fixture(scope="module")
def processor():
    return tiny_processor("qwen3_vl")


def samples_of(example, processor, **settings):
    return example_to_samples(example, 0, processor, RowSettings(**settings)).samples


def contents(sample):
    """The content of each image that a sample shows, in order."""
    return [image.content for image in shown_images(sample.image_features, sample.images)]


def served(processor, messages):
    """Token ids and pixels of a prompt, as the processor makes them."""
    return processor.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_pixels_are_those_of_the_processor(family):
    processor = tiny_processor(family)
    samples = samples_of({"messages": CHAT}, processor)
    assert [sample.message_index for sample in samples] == [1, 3, 5]
    for sample in samples:
        expected = served(processor, CHAT[: sample.message_index])
        prompt = sample.token_ids[: sample.prompt_length]
        assert prompt.tolist() == expected["input_ids"][0].tolist()
        is_placeholder = sample.token_ids == placeholders_of(processor).token_id
        assert ((sample.image_features >= 0) == is_placeholder).all()
        inputs = image_loader_of(processor)(shown_images(sample.image_features, sample.images))
        for name, value in inputs.items():
            assert torch.equal(value, expected[name]), name
    first, second, third = map(contents, samples)
    assert (second, third) == ([second[0], second[1], second[0]], second)
    assert first == second[:1] or placeholders_of(processor).depends_on_company


def test_a_processor_that_writes_an_image_in_company_differently_makes_it_another_image():
    processor = tiny_processor("llava_onevision")
    first, second, _ = samples_of({"messages": CHAT}, processor)
    (alone,), (in_company, *_) = (shown_images(sample.image_features, sample.images) for sample in (first, second))
    assert (alone.in_company, in_company.in_company) == (False, True)
    assert alone != in_company
    twice = [user(IMAGES[0], IMAGES[0], "The same?"), answer("Yes.")]
    row = example_to_rows({"messages": [*CHAT[:2], *twice]}, 0, processor, RowSettings())[0].row
    inputs = image_loader_of(processor)(row.images)
    assert len(inputs["pixel_values"]) == len(row.images) == 2


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_dataset_gives_the_same_rows_and_pixels(form, processor, tmp_path):
    dataset = forms(CHAT, tmp_path)[form]
    assert holds_images(dataset)
    rows = prepare_dataset(hide_image_columns(dataset), processor, RowSettings())
    expected = example_to_rows({"messages": CHAT}, 0, processor, RowSettings())[0].row
    if form != "prompt and completion":
        assert rows[0]["input_ids"] == expected.input_ids.tolist()
        assert rows[0]["image_features"] == expected.image_features.tolist()
    assert "bytes" not in str(rows[0]["image_references"]).replace("'bytes': None", "")
    loader = image_loader_of(processor)
    batch = image_collator(loader)([rows[0]])
    pixels = processor.image_processor(IMAGES[:2], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], pixels["pixel_values"])
    assert torch.equal(batch["image_grid_thw"], pixels["image_grid_thw"])


def test_images_of_a_column_stand_at_the_start_of_the_first_user_message_if_no_part_asks_for_them():
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    rest, images = take_images({"images": IMAGES[:2], "messages": messages})
    assert rest["messages"][1]["content"] == [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "U"}]
    assert [image.load().size for image in images] == [image.size for image in IMAGES[:2]]
    assert take_images({"image": IMAGES[0], "messages": messages})[1] == images[:1]


BAD_IMAGE = {"role": "user", "content": [{"type": "image", "image": 3}]}
UNREADABLE = [
    ({"images": IMAGES[:1], "messages": without_images(CHAT)}, "has 1 images in its column, and 3 parts"),
    ({"messages": without_images(CHAT)}, "has 0 images in its column, and 3 parts"),
    ({"messages": [BAD_IMAGE, CHAT[1]]}, "Expected an image, its bytes"),
    ({"messages": [user("Hi."), {**CHAT[0], "role": "assistant"}]}, "it shows an image, which a model that writes"),
    ({"messages": [user("A <|image_pad|>.", IMAGES[0]), answer("x")]}, "2 placeholders '<|image_pad|>' for 1"),
    ({"messages": [user(IMAGES[0]), answer("x")], "images": ["a.png"]}, "has 1 images in its column, and 0 parts"),
]


@pytest.mark.parametrize(("example", "message"), UNREADABLE)
def test_what_cannot_be_read_is_named(example, message, processor):
    with pytest.raises(BadRowError, match=f"Row 0: .*{message.replace('|', '[|]')}"):
        samples_of(example, processor)


def test_images_that_cannot_be_read_name_their_rows(processor, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    bad = [user(str(tmp_path / "broken.png"), "?"), answer("x")]
    bad[0]["content"][0] = {"type": "image", "path": str(tmp_path / "broken.png")}
    gone = copy.deepcopy(bad)
    gone[0]["content"][0]["path"] = str(tmp_path / "gone.png")
    good = forms(CHAT, tmp_path)["parts of paths"][0]["messages"]
    dataset = datasets.Dataset.from_list([{"messages": messages} for messages in (bad, good, gone)])
    with pytest.raises(
        ValueError, match=r"2 of 3 rows(.|\n)*Image 1 of 1: An image cannot be read \('[^']*broken.png'"
    ):
        prepare_dataset(dataset, processor, RowSettings())
    assert len(prepare_dataset(dataset, processor, RowSettings(), bad_rows="drop")) == 1


def test_an_image_that_changes_after_preparation_names_its_row(processor, tmp_path):
    dataset = forms(CHAT, tmp_path)["parts of paths"]
    rows = prepare_dataset(dataset, processor, RowSettings())
    screen(7, 32, 32).save(tmp_path / "0.png")
    collate = image_collator(image_loader_of(processor))
    with pytest.raises(ValueError, match="Row 0, image 1: An image has 16 placeholders, and had 4 when its row was"):
        collate([rows[0]])
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="Row 0, image 1: An image cannot be read"):
        collate([rows[0]])


def test_rows_need_the_dataset_that_they_refer_to(tmp_path):
    rows = prepare_dataset(in_column([CHAT]), tiny_processor("qwen3_vl"), RowSettings())
    elsewhere = image_collator(image_loader_of(tiny_processor("qwen3_vl")))
    with pytest.raises(ValueError, match="refer to images of a dataset that is not at hand"):
        elsewhere([rows[0]])


def test_long_conversations_split_and_keep_the_images_of_each_part():
    processor = tiny_processor("qwen3_5")  # its template drops the reasoning of earlier turns, so that turns branch
    chat = [{**m, "reasoning_content": "So. " * 20} if m["role"] == "assistant" else m for m in CHAT]
    longest = max(map(len, samples_of({"messages": chat}, processor)))
    whole = prepare_dataset(in_column([chat]), processor, RowSettings())
    rows = prepare_dataset(in_column([chat]), processor, RowSettings(max_row_tokens=longest))
    assert len(whole) == 1 < len(rows)
    assert max(rows["num_tokens"]) <= longest
    for row in rows:
        shown = {feature for feature in row["image_features"] if feature >= 0}
        assert shown == set(range(sum(image["num_features"] for image in row["image_references"])))
    assert sum(map(_num_trained, rows)) == _num_trained(whole[0])


def _num_trained(row):
    return sum(part > 0 for part in row["token_parts"])


@pytest.mark.parametrize("max_length", range(8, 70, 6))
def test_max_length_leaves_no_part_of_an_image(max_length, processor):
    for sample in samples_of({"messages": CHAT}, processor, max_length=max_length):
        sizes = [image.num_features for image in shown_images(sample.image_features, sample.images)]
        assert (sample.image_features >= 0).sum() == sum(sizes)


LAST_IMAGES = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% set last = loop.index > messages|length - 2 %}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% if last %}<|vision_start|><|image_pad|><|vision_end|>{% else %}DROPPED{% endif %}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("written", ["", "(image)"])
def test_a_template_that_drops_earlier_images_shows_those_that_it_keeps(written):
    processor = tiny_processor("qwen3_vl")
    processor.chat_template = LAST_IMAGES.replace("DROPPED", written)
    chat = [*CHAT[:4], user("Now ", IMAGES[3], "!"), answer("Yes.")]
    first, second, third = samples_of({"messages": chat}, processor)
    assert [len(contents(sample)) for sample in (first, second, third)] == [1, 2, 1]
    assert contents(second)[1] == contents(first)[0]
    assert contents(third)[0] not in contents(second)
    for sample in (first, second, third):
        assert sample.token_ids[: sample.prompt_length].tolist() == _served_tokens(processor, chat, sample)


def _served_tokens(processor, chat, sample):
    """The prompt as the processor writes it, with the images that its template shows."""
    text = processor.apply_chat_template(chat[: sample.message_index], add_generation_prompt=True)
    images = images_of(chat[max(sample.message_index - 1, 0) : sample.message_index])
    return processor(images=[images], text=[text])["input_ids"][0]


# A window over the images: without one of them, an earlier one would be shown.
WINDOW = (
    "{% set left = namespace(images=0) %}{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{% set left.images = left.images + 1 %}{% endif %}{% endfor %}{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}{% if left.images > 2 %}(earlier){% else %}<|image_pad|>{% endif %}"
    "{% set left.images = left.images - 1 %}{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("written", ["(earlier)", ""])
def test_a_template_with_a_window_over_images_shows_the_last_ones(written):
    processor = tiny_processor("qwen3_vl")
    processor.chat_template = WINDOW.replace("(earlier)", written)
    rounds = [([user(image, "?")], [answer("Yes.")]) for image in IMAGES[:4]]
    chat = [message for question, reply in rounds for message in (*question, *reply)]
    samples = samples_of({"messages": chat}, processor)
    (first, second), (_, third), (_, fourth) = (contents(sample) for sample in samples[1:])
    assert len({first, second, third, fourth}) == 4
    assert [contents(sample) for sample in samples] == [[first], [first, second], [second, third], [third, fourth]]


def test_a_template_of_which_nobody_can_tell_which_images_it_drops_is_refused():
    processor = tiny_processor("qwen3_vl")
    processor.chat_template = (
        "{% for message in messages %}{{ message.role }}{% for part in message.content %}{{ part.text }}{% endfor %}"
        "{% if 'Now' in message.content[-1].text %}<|image_pad|>{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    chat = [user("A"), answer("B"), user(IMAGES[0], IMAGES[1], "Now")]
    with pytest.raises(
        BadRowError, match="the template shows 1 of the 2 images before it, and which ones is not certain"
    ):
        samples_of({"messages": [*chat, answer("C")]}, processor)


def test_streams_hold_images_encoded_and_give_the_same_batches(processor):
    stored = prepare_dataset(in_column([CHAT, CHAT[:2]]), processor, RowSettings())
    stream = prepare_dataset(
        hide_image_columns(in_column([CHAT, CHAT[:2]]).to_iterable_dataset()), processor, RowSettings()
    )
    collate = image_collator(image_loader_of(processor))
    for row, expected in zip(stream, stored, strict=True):
        assert row["image_references"][0]["source"]["bytes"] == png(IMAGES[0])
        one, other = collate([row]), collate([expected])
        assert torch.equal(one["tree"].image_features, other["tree"].image_features)
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_several_processes_give_the_same_rows_and_a_second_time_nothing_is_prepared(processor, tmp_path, monkeypatch):
    in_column([CHAT, CHAT[:2], CHAT[:4]]).save_to_disk(tmp_path / "stored")
    stored = datasets.load_from_disk(str(tmp_path / "stored"))
    several = prepare_dataset(stored, processor, RowSettings(max_length=1000), num_proc=2)
    rows = prepare_dataset(stored, processor, RowSettings())
    for name in ("input_ids", "image_features", "image_references"):
        assert several[name][:] == rows[name][:]
    monkeypatch.setattr(
        "trl_singlepass.data.conversations.example_to_samples", lambda *_: pytest.fail("prepared again")
    )
    again = prepare_dataset(datasets.load_from_disk(str(tmp_path / "stored")), processor, RowSettings())
    batch = image_collator(image_loader_of(processor))([again[0]])
    assert len(batch["image_grid_thw"]) == 2


def test_tokenised_turns_show_their_images(processor):
    samples = samples_of({"messages": CHAT}, processor)
    given = [CHAT_IMAGES[:1], CHAT_IMAGES, CHAT_IMAGES]
    turns = [
        {
            "prompt_ids": sample.token_ids[: sample.prompt_length].tolist(),
            "completion_ids": sample.token_ids[sample.prompt_length :].tolist(),
            "images": [{"bytes": png(image), "path": None} for image in images],
        }
        for sample, images in zip(samples, given, strict=True)
    ]
    dataset = datasets.Dataset.from_list([{"turns": turns}])
    (row,) = prepare_dataset(dataset, processor, RowSettings())
    (expected,) = prepare_dataset(in_column([CHAT]), processor, RowSettings())
    for name in ("input_ids", "image_features", "token_weights"):
        assert (getattr(Row.from_columns(row), name) == getattr(Row.from_columns(expected), name)).all()
    batch = image_collator(image_loader_of(processor))([row])
    assert len(batch["image_grid_thw"]) == 2
    turns[1]["images"] = turns[1]["images"][:2]
    with pytest.raises(
        BadRowError, match=r"Turn 1: its tokens have 16 placeholders for images, but its 2 images have 4 \+ 8 = 12"
    ):
        samples_of({"turns": turns}, processor)


def test_a_log_of_single_turns_with_images_is_gathered(processor):
    samples = samples_of({"messages": CHAT}, processor)
    log = [
        {
            "prompt_ids": sample.token_ids[: sample.prompt_length].tolist(),
            "completion_ids": sample.token_ids[sample.prompt_length :].tolist(),
            "conversation_id": "a",
            "images": CHAT_IMAGES[: len(contents(sample))],
        }
        for sample in samples
    ]
    (row,) = prepare_dataset(hide_image_columns(datasets.Dataset.from_list(log)), processor, RowSettings())
    (expected,) = prepare_dataset(in_column([CHAT]), processor, RowSettings())
    assert row["image_features"] == expected["image_features"]
    batch = image_collator(image_loader_of(processor))([row])
    assert len(batch["image_grid_thw"]) == 2


def test_a_tokenizer_alone_reads_no_images(processor):
    """Each error offers both: the processor for a model that reads images, and text alone for one that does not."""
    text = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    with pytest.raises(BadRowError, match=r"processing_class.*text model"):
        samples_of({"messages": text, "images": IMAGES[:1]}, processor.tokenizer)
    samples_of({"messages": text, "images": []}, processor.tokenizer)
    for dataset in (in_column([CHAT]), hide_image_columns(in_column([CHAT]))):
        with pytest.raises(ValueError, match=r"processing_class.*text model.*remove_columns\(\['images'\]\)"):
            prepare_dataset(dataset, processor.tokenizer, RowSettings())
    parts = datasets.Dataset.from_list([{"messages": CHAT}])
    with pytest.raises(ValueError, match=r"of the type 'image'.*processing_class.*text model"):
        prepare_dataset(parts, processor.tokenizer, RowSettings())


def test_sizes_follow_the_orientation_of_a_photo(tmp_path):
    image = screen(1, 32, 16)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    _, (encoded,) = take_images(
        {"messages": [{"role": "user", "content": [{"type": "image", "path": str(tmp_path / "turned.jpg")}]}]}
    )
    assert encoded.read_size() == encoded.load().size == (16, 32)


def test_pixels_are_not_decoded_to_prepare(processor, monkeypatch):

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    dataset = datasets.Dataset.from_list(
        [{"images": [{"bytes": png_of_chat, "path": None} for png_of_chat in PNGS], "messages": without_images(CHAT)}]
    )
    prepare_dataset(dataset, processor, RowSettings())


PNGS = [png(image) for image in CHAT_IMAGES]
