"""What the project relies on in other libraries is listed, recorded for known releases, and unchanged in these."""

import zipfile
from functools import cache

import pytest

from support.trainers import overridden
from trl_singlepass import SinglePassDPOTrainer, SinglePassSFTTrainer
from versions import guard, relied_on, report
from versions.sources import digest, in_wheel, installed


# Of PyTorch, datasets, flash-attn and the standard library.
OTHERS = {
    *("_C", "_current_graph_task_id", "_dynamo", "_DropoutNd", "_fingerprint", "_actions", "_option_string_actions"),
    *("_exit", "_init_fn", "_get_cache_file_path"),
    *(f"_scaled_dot_product_flash_attention{end}" for end in ("", "_backward", "_for_cpu", "_for_cpu_backward")),
    *(f"_flash_attn_{way}" for way in ("forward", "backward", "varlen_forward", "varlen_backward")),
    "_flash_attention_backward",  # of ATen, as `_flash_attention_forward` is as well
}


def test_every_private_name_that_is_read_is_found_where_it_is_defined():
    assert {name for name in relied_on.private_names() if not relied_on.places_of(name)} <= OTHERS


def test_methods_in_the_place_of_others_take_what_these_take():
    assert relied_on.signature_gaps() == []


class Stock:
    def update(self, states, layer_idx, count=1): ...


class Own(Stock):
    def update(self, states, layer_idx): ...


def test_a_parameter_that_a_release_adds_is_found():
    (gap,) = relied_on.gaps_between(Own, [Stock])
    assert gap.endswith("Own.update does not take count")


# What transformers 5.25 broke: the convolution moved into a helper, and a cache is asked for another method.
@pytest.mark.parametrize(
    "change",
    [
        "modeling_qwen3_next.causal_conv1d_forward is new",
        "modeling_mamba2.Mamba2Mixer.forward",
        "cache_utils.Cache.get_recurrent_states_to_keep is new",
        "cache_utils.Cache.activate_past_recording changed",
    ],
)
def test_what_a_release_broke_would_have_been_reported(change):
    record = guard.read_record()["transformers"]
    found = guard.changes("transformers", "5.25.0", record["5.25.0"], {"transformers": {"5.24.0": record["5.24.0"]}})
    assert any(change in line for line in found)


@cache
def digests(package):
    return guard.digests_of(package, installed(package)[1])


@pytest.mark.parametrize("package", guard.PACKAGES)
def test_an_installed_release_changes_nothing_that_is_relied_on(package):
    version, _ = installed(package)
    changes = guard.changes(package, version, digests(package), record := guard.read_record())
    if version not in record[package]:
        pytest.skip(f"{package} {version} is not recorded. {'; '.join(changes) or 'Nothing has changed'}")
    assert changes == []


def test_overridden_methods_are_found_in_a_class_above():
    found = {name.rpartition(".")[2] for package in ("transformers", "trl") for name in digests(package)}
    for trainer in (SinglePassSFTTrainer, SinglePassDPOTrainer):
        assert overridden(trainer) <= found


CODE = '''
class Trainer:
    """Trains."""

    def step(self):
        """Take a step."""
        return {value}  # a comment
'''


def wheel(folder, version, value):
    path = folder / f"library-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("library/trainer.py", CODE.format(value=value))
    return in_wheel(path)


def test_a_release_that_changes_a_method_is_reported_by_name(tmp_path):
    version, read = wheel(tmp_path, "1.0.0", 1)
    name = "library.trainer.Trainer.step"
    record = {"library": {version: {name: digest(name, read)}}}
    assert version == "1.0.0"
    assert record["library"][version][name] is not None
    for version, value, expected in (
        ("1.1.0", 1, []),
        ("1.2.0", 2, [f"{name} changed (library 1.0.0 → 1.2.0)"]),
    ):
        _, read = wheel(tmp_path, version, value)
        assert guard.changes("library", version, {name: digest(name, read)}, record) == expected
    assert guard.changes("library", "2.0.0", {name: None}, record) == [f"{name} is gone (library 1.0.0 → 2.0.0)"]


def test_pages_print_the_recorded_results():
    results = report.read_results()
    assert {"1.10.0"} < {one["versions"]["trl"] for one in results}
    assert not any(one["failed"] for one in results)
    for path, text in report.PAGES.items():
        page = path.read_text()
        assert page.count(report.BEGIN) == page.count(report.END) == 1
        assert report.with_results(page, text(results)) == page
