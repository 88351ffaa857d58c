"""Try every tuner type of PEFT on a tree; read and write the page with the results, docs/adapters.md."""

import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import peft
import torch

from support.float64_comparison import assert_equal_to_npass
from support.sample_sets import branchy_chat
from support.survey_pages import Outcome, counts, grouped, read_grouped, refused_by_check, write_part
from support.tiny_models import tiny_model
from support.tree_checks import checked
from trl_singlepass.engine.enable import disable_tree, without_adapters
from trl_singlepass.reference.verification import ForcedFloat64
from trl_singlepass.training import refusals
from trl_singlepass.training.situation import Situation


PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
STATUSES = ["exact", "refused"]
LINEAR = ["q_proj", "v_proj", "down_proj"]
INVOCATION = [2, 3]  # what opens an answer in the chats of `support.sample_sets`


# The adapters --------------------------------------------------------------------------------------------------------


def of(name, **options):
    """Return a function that gives a model an adapter of a class of PEFT."""

    def adapt(model):
        return peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **options))

    return adapt


def on_linear(name, **options):
    return of(name, target_modules=LINEAR, **options)


def lora(**options):
    return on_linear("LoraConfig", r=4, **options)


def lora_with(option, name, **values):
    """Return a function that gives a model LoRA with an option that is a configuration itself."""

    def adapt(model):
        return lora(**{option: getattr(peft.tuners.lora.config, name)(**values)})(model)

    return adapt


def virtual_tokens(name, **options):
    return of(name, num_virtual_tokens=4, **options)


def eva(model):
    model = lora(init_lora_weights="eva")(model)
    ids = torch.arange(64).reshape(4, 16)
    peft.initialize_lora_eva_weights(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3)
    return model


def corda(model):
    from peft.tuners.lora.corda import preprocess_corda

    config = _lora_config(init_lora_weights="corda", corda_config=peft.tuners.lora.config.CordaConfig())

    @torch.no_grad()
    def run():
        model(torch.randint(0, 90, (1, 256)))

    preprocess_corda(model, config, run_model=run)
    return peft.get_peft_model(model, config)


def lora_ga(model):
    from peft.tuners.lora.loraga import preprocess_loraga

    config = _lora_config(init_lora_weights="lora_ga", lora_ga_config=peft.tuners.lora.config.LoraGAConfig())

    def step():
        ids = torch.randint(0, 90, (2, 16))
        model(ids, labels=ids).loss.backward()

    preprocess_loraga(model, config, step)
    return peft.get_peft_model(model, config)


def lora_fa(model):
    from peft.optimizers import create_lorafa_optimizer

    model = lora()(model)
    create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    return model


def arrow(model):
    with _experts(model) as (model, paths):
        config = peft.tuners.lora.config.ArrowConfig(top_k=2, rng_seed=0)
        model = peft.create_arrow_model(model, list(paths.values()), config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and "task" in name)
    return model


def xlora(model):
    model.config.use_cache = False
    with _experts(model) as (model, paths):
        options = {"hidden_size": model.config.hidden_size, "adapters": paths, "xlora_dropout_p": 0.0}
        return of("XLoraConfig", use_trainable_adapters=True, **options)(model)


def several(model):
    model = of("LoraConfig", r=4, target_modules=["q_proj"])(model)
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    return model


def mixed(model):
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("other", peft.LoHaConfig(r=4, target_modules=["v_proj"]))
    model.set_adapter(["default", "other"])
    return model


def _lora_config(**options):
    return peft.LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM", **options)


class _experts:
    """Two trained adapters of a model, saved for the time of the context."""

    def __init__(self, model):
        self.model, self.folder = model, tempfile.TemporaryDirectory()

    def __enter__(self):
        paths = {}
        for name in ("0", "1"):
            adapted = away_from_start(lora()(self.model), seed=int(name))
            paths[name] = f"{self.folder.name}/{name}"
            adapted.save_pretrained(paths[name])
            self.model = adapted.unload()
        return self.model, paths

    def __exit__(self, *_):
        self.folder.cleanup()


LORA_WEIGHTS = ("gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal", "mica")
OF_A_RANK = [
    *("DeftConfig", "DeloraConfig", "GloraConfig", "GraloraConfig", "HRAConfig", "HiraConfig", "LoHaConfig"),
    *("LoKrConfig", "MissConfig", "PeanutConfig", "PolyConfig", "RandLoraConfig"),
]
ADAPTERS = {
    "LoraConfig": lora(),
    "LoraConfig(use_rslora=True)": lora(use_rslora=True),
    "LoraConfig(use_dora=True)": lora(use_dora=True),
    "LoraConfig(lora_bias=True, bias='all')": lora(lora_bias=True, bias="all"),
    "LoraConfig(rank_pattern=…, alpha_pattern=…)": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 16}),
    "LoraConfig(target_modules=['embed_tokens', …])": of("LoraConfig", r=4, target_modules=["embed_tokens", "q_proj"]),
    "LoraConfig(target_parameters=…)": of(
        "LoraConfig",
        r=4,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "LoraConfig(modules_to_save=['lm_head', 'embed_tokens'])": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "LoraConfig(trainable_token_indices=…)": lora(trainable_token_indices=[2, 3, 4]),
    "LoraConfig(layer_replication=…)": lora(layer_replication=[[0, 2], [1, 2]]),
    **{f"LoraConfig(init_lora_weights={way!r})": lora(init_lora_weights=way) for way in LORA_WEIGHTS},
    "LoraConfig(init_lora_weights='eva')": eva,
    "LoraConfig(init_lora_weights='corda')": corda,
    "LoraConfig(init_lora_weights='lora_ga')": lora_ga,
    "LoraConfig(kasa_config=…)": lora_with("kasa_config", "KasaConfig"),
    "LoraConfig(use_bdlora=…)": lora_with(
        "use_bdlora",
        "BdLoraConfig",
        target_modules_bd_a=["q_proj", "v_proj"],
        target_modules_bd_b=["down_proj"],
        nblocks=2,
    ),
    "LoraConfig(monteclora_config=…)": lora_with(
        "monteclora_config", "MontecloraConfig", num_samples=2, buffer_size=4
    ),
    "LoraConfig(velora_config=…, init_type='random')": lora_with(
        "velora_config", "VeloraConfig", num_groups=8, init_type="random"
    ),
    "LoraConfig(velora_config=…)": lora_with("velora_config", "VeloraConfig", num_groups=8),
    "LoraConfig(alora_invocation_tokens=…)": lora(alora_invocation_tokens=INVOCATION),
    "LoraConfig(arrow_config=…)": arrow,
    "LoraConfig and create_lorafa_optimizer": lora_fa,
    "LoraConfig, several active": several,
    "PeftMixedModel": mixed,
    **{name: on_linear(name, r=4) for name in OF_A_RANK},
    **{name: virtual_tokens(name) for name in ("CartridgeConfig", "PrefixTuningConfig", "PromptTuningConfig")},
    "AdaLoraConfig": on_linear("AdaLoraConfig", init_r=4, target_r=2, total_step=10),
    "AdamssConfig": on_linear("AdamssConfig", r=8, num_subspaces=2),
    "AdaptionPromptConfig": of("AdaptionPromptConfig", adapter_len=4, adapter_layers=2, target_modules="self_attn"),
    "BOFTConfig": on_linear("BOFTConfig", boft_block_size=4),
    "BeftConfig": of("BeftConfig", target_modules=["v_proj"]),
    "C3AConfig": on_linear("C3AConfig", block_size=8),
    "CPTConfig": of("CPTConfig", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    "FourierFTConfig": on_linear("FourierFTConfig", n_frequency=20),
    "FrodConfig": on_linear("FrodConfig", progressbar=False),
    "IA3Config": of("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LNTuningConfig": of("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "LilyConfig": on_linear("LilyConfig", r=4, stride_A=1, num_B=2),
    "MultitaskPromptTuningConfig": virtual_tokens("MultitaskPromptTuningConfig", num_tasks=2),
    "OFTConfig": on_linear("OFTConfig", oft_block_size=4),
    "OSFConfig": on_linear("OSFConfig", effective_rank=8),
    "PromptEncoderConfig": virtual_tokens("PromptEncoderConfig", encoder_hidden_size=16),
    "PsoftConfig": on_linear("PsoftConfig", r=4),
    "PveraConfig": of("PveraConfig", r=8, target_modules=["q_proj", "v_proj"]),
    "RoadConfig": on_linear("RoadConfig", group_size=8),
    "ShadowConfig": of("ShadowConfig", r=4, shadow_dropout=0.0),
    "ShiraConfig": on_linear("ShiraConfig", r=4),
    "SupertuningConfig": on_linear("SupertuningConfig", sparsity=0.9),
    "TinyLoraConfig": on_linear("TinyLoraConfig", r=2, u=8),
    "TrainableTokensConfig": of("TrainableTokensConfig", token_indices=[2, 3, 4]),
    "UniLoraConfig": on_linear("UniLoraConfig", r=4, theta_d_length=32),
    "VBLoRAConfig": of("VBLoRAConfig", r=4, num_vectors=10, vector_length=16, target_modules=["q_proj", "v_proj"]),
    "VeraConfig": of("VeraConfig", r=8, target_modules=["q_proj", "v_proj"]),
    "WaveFTConfig": on_linear("WaveFTConfig", n_frequency=20),
    "XLoraConfig": xlora,
}
# PEFT gives these to models of this kind only.
FAMILIES = {
    "LoraConfig(target_parameters=…)": "qwen3-moe",
    "LoraConfig(layer_replication=…)": "llama",
    "AdaptionPromptConfig": "llama",
}


def surveyed_types():
    """Return the tuner types that the table has."""
    types = {config.__name__: kind for kind, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    return {types[name] for name in (label.split("(")[0] for label in ADAPTERS) if name in types}


def adapted(label, model=None):
    """Return a tiny model in float32 with an adapter, as its user would begin to train it."""
    torch.manual_seed(0)
    if model is None:
        model = tiny_model(FAMILIES.get(label, "qwen3"), dtype=torch.float32, attn_implementation="sdpa")
    return ADAPTERS[label](model)


def away_from_start(model, seed=0, scale=0.05):
    """Move all trained parameters, since many adapters have no effect at the start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def draws_random_numbers(model):
    """Return whether two forwards of a model in training mode differ."""
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        first, second = (model.train()(input_ids=ids).logits for _ in range(2))
    return not torch.equal(first, second)


# The survey ----------------------------------------------------------------------------------------------------------


def survey(label):
    """
    Return the outcome for an adapter: `exact`, or `refused` with the reason.

    Raises:
        AssertionError: If the adapter is accepted but its gradients are wrong.
    """
    model = adapted(label)
    try:
        refusals.check(Situation(SimpleNamespace(wave_tokens=None), model), refusals.ADAPTERS)
    except ValueError as error:
        return Outcome(label, "refused", re.search(r"single pass: (.+?)\. ", str(error)).group(1))
    implementation = without_adapters(model).config._attn_implementation
    report = checked(model)
    if not report.ok:
        return Outcome(label, "refused", refused_by_check(report))
    disable_tree(model, implementation)
    is_random = draws_random_numbers(away_from_start(model))
    compare_in_float64(model.double().train(not is_random))
    remark = "in evaluation mode; draws random numbers in training, as dropout does" if is_random else ""
    return Outcome(label, "exact", remark)


def compare_in_float64(model):
    """Assert that a single pass gives the loss and the gradient of every trained parameter of separate samples."""
    torch.set_default_dtype(torch.float64)  # for adapters that make tensors without a dtype
    try:
        with ForcedFloat64():
            assert_equal_to_npass(model, [branchy_chat()])
    finally:
        torch.set_default_dtype(torch.float32)


def read_page():
    """Return the PEFT version of the page and its outcomes by label."""
    version = re.search(r"^With PEFT (\S+):", PAGE.read_text(encoding="utf-8"), re.M).group(1)
    return version, read_grouped(PAGE, "adapters")


def write_page(outcomes):
    """Write the table of the page from its outcomes by label."""
    found = counts([outcome.status for outcome in outcomes.values()], STATUSES)
    summary = f"With PEFT {peft.__version__}: {len(surveyed_types())} tuner types in several forms, {found}."
    header = ["| | remark, or reason | adapter |", "|---|---|---|"]
    write_part(PAGE, "adapters", "\n".join([summary, "", *header, *grouped(outcomes.values()), ""]))
