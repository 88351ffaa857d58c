"""Models and tokenizers are loaded as asked."""

import json

import pytest
import torch


def test_remote_code_is_off_unless_asked_for(monkeypatch, model, data, run):
    from trl_singlepass.cli import loading

    asked = []
    original = loading.AutoTokenizer.from_pretrained

    def remember(name, trust_remote_code):
        asked.append(trust_remote_code)
        return original(name)

    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", remember)
    run("inspect", model, data)
    run("inspect", model, data, "--trust_remote_code")
    assert asked == [False, True]


def test_models_are_loaded_as_asked(model):
    from trl_singlepass.cli.loading import load_config, load_model

    loaded = load_model(model, dtype="float64", attn_implementation="eager", device="cpu")
    assert loaded.dtype is torch.float64
    assert loaded.config._attn_implementation == "eager"
    assert load_config(model).model_type == "qwen3"
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model("no-such/model", dtype="float32", attn_implementation=None, device="cpu")


@pytest.mark.parametrize("kind", ["tokenizer", "config"])
def test_a_local_model_with_code_of_its_own_is_told_apart_from_one_that_the_hub_has(tmp_path, monkeypatch, kind):
    from trl_singlepass.cli import loading

    monkeypatch.setattr("transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE", 0)
    monkeypatch.setattr(loading, "is_offline_mode", lambda: True)
    auto_map = {"AutoConfig": "code.Own", "AutoTokenizer": ["code.Own", None]}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto_map}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "Own"}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        getattr(loading, f"load_{kind}")(str(tmp_path))
