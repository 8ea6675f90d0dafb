"""model.* and Hugging Face's config.json, both ways. Imports no torch.

What config.json may hold is a closed world: a key either sets one of model.*, has the one value that this model has
too, is known not to change the model, or is refused by name. So nothing is dropped in silence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from parallax.config_fields import Config, ModelConfig, value_fits
from parallax.errors import ConfigError
from parallax.plain_files import open_regular
from parallax.plain_json import parse_json

__all__ = ["FAMILIES", "disagreements", "family_of", "make_hf_config", "model_keys", "read_hf_config"]

MAX_CONFIG_BYTES = 1 << 20
RESOLVED = {"kv_heads": "num_kv_heads", "head_dim": "head_size", "ffn": "ffn_size"}
"""Keys that may be none, and the properties that say what they then are."""
_HARMLESS = (
    "architectures model_type transformers_version torch_dtype dtype use_cache _name_or_path bos_token_id eos_token_id "
    "pad_token_id unk_token_id initializer_range attention_dropout resid_pdrop embd_pdrop attn_pdrop n_ctx "
    "max_position_embeddings n_positions sliding_window use_sliding_window max_window_layers layer_types "
    "task_specific_params summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout reorder_and_upcast_attn gradient_checkpointing output_past return_dict "
    "rope_parameters rope_scaling rope_theta tie_word_embeddings id2label label2id "
    "finetuning_task is_decoder torchscript attn_implementation _attn_implementation_autoset "
    "output_attentions output_hidden_states"
)
HARMLESS = frozenset(_HARMLESS.split())
"""Read elsewhere in this file, or of no weight for what the model computes."""
NO_DEFAULT = object()


@dataclass(frozen=True, slots=True)
class Family:
    """names: our key -> (config.json's name, type, its default there). fixed: model.* that the family decides.
    only: config.json's keys that must have one of these values, None where they may be absent or null.
    """

    architecture: str
    names: Mapping[str, tuple[str, type, Any]]
    fixed: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    tied: bool = False
    rest: Mapping[str, Any] = field(default_factory=dict)


_LLAMA_NAMES: dict[str, tuple[str, type, Any]] = {
    "layers": ("num_hidden_layers", int, NO_DEFAULT),
    "hidden": ("hidden_size", int, NO_DEFAULT),
    "heads": ("num_attention_heads", int, NO_DEFAULT),
    "kv_heads": ("num_key_value_heads", int, None),
    "head_dim": ("head_dim", int, None),
    "ffn": ("intermediate_size", int, NO_DEFAULT),
    "vocab": ("vocab_size", int, NO_DEFAULT),
    "norm_eps": ("rms_norm_eps", float, 1e-6),
}
_LLAMA_SHAPE = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "qk_norm": False, "bias": False}
_SILU = {"hidden_act": ("silu", "swish")}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {**_LLAMA_NAMES, "bias": ("attention_bias", bool, False)},
        _LLAMA_SHAPE,
        _SILU | {"pretraining_tp": (1, None), "mlp_bias": (False, True, None)},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _LLAMA_NAMES | {"kv_heads": ("num_key_value_heads", int, NO_DEFAULT)},
        _LLAMA_SHAPE,
        _SILU,
        rest={"sliding_window": None},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _LLAMA_NAMES | {"kv_heads": ("num_key_value_heads", int, NO_DEFAULT), "head_dim": ("head_dim", int, 128)},
        _LLAMA_SHAPE | {"qk_norm": True},
        _SILU | {"attention_bias": (False, None)},
        rest={"use_sliding_window": False},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "layers": ("n_layer", int, NO_DEFAULT),
            "hidden": ("n_embd", int, NO_DEFAULT),
            "heads": ("n_head", int, NO_DEFAULT),
            "ffn": ("n_inner", int, None),
            "max_positions": ("n_positions", int, 1024),
            "vocab": ("vocab_size", int, NO_DEFAULT),
            "norm_eps": ("layer_norm_epsilon", float, 1e-5),
        },
        {"positions": "learned", "norm": "layernorm", "activation": "gelu", "qk_norm": False, "bias": True},
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", None),
            "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None),
            "add_cross_attention": (False, None),
        },
        tied=True,
    ),
}


def read_hf_config(directory: Path) -> dict[str, Any]:
    """DIRECTORY/config.json. Raises ConfigError where there is none or it is not JSON."""
    path = Path(directory) / "config.json"
    if not os.path.lexists(path):
        raise ConfigError(
            f"init_from={directory} has no config.json; give a directory that save_pretrained "
            "wrote, or init_from=none, as for a run that goes on"
        )
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            data = parse_json(file.read(MAX_CONFIG_BYTES))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}; it must be a regular file, no link: "
            "`hf download MODEL --local-dir DIR` writes such"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is no JSON object")
    return data


def model_keys(hf: Mapping[str, Any], where: object = "config.json") -> dict[str, Any]:
    """The model.* keys, by their dotted names, of a config.json. Raises one ConfigError with all that stands against
    it: an unknown family, a key that is missing or unknown, a value that this model cannot represent.
    """
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"{where}: model_type={kind!r} is not supported; what is: {', '.join(FAMILIES)}")
    family, problems = FAMILIES[kind], []
    found: dict[str, Any] = dict(family.fixed)
    for ours, (theirs, wanted, default) in family.names.items():
        value = hf.get(theirs)
        value = default if value is None else value
        if value is NO_DEFAULT:
            problems.append(f"{theirs} is missing")
        elif value is not None and not _is(value, wanted):
            problems.append(f"{theirs}={value!r} is no {wanted.__name__}")
        else:
            found[ours] = float(value) if wanted is float else value
    for name, allowed in family.only.items():
        if hf.get(name) not in allowed:
            problems.append(f"{name}={hf.get(name)!r}, and the model here has {allowed[0]!r}")
    if kind == "llama" and bool(hf.get("mlp_bias")) != found.get("bias"):
        problems.append("attention_bias and mlp_bias differ, and model.bias is one for both")
    tied = hf.get("tie_word_embeddings")
    found["tie_embeddings"] = family.tied if tied is None else tied
    if not isinstance(found["tie_embeddings"], bool):
        problems.append(f"tie_word_embeddings={tied!r} is no bool")
    if found["positions"] == "rotary":
        problems += _rope(hf, found)
    known = HARMLESS | {name for name, _, _ in family.names.values()} | set(family.only)
    problems += [
        f"{name}={hf[name]!r} is not known here; remove it from config.json if it does not change the model"
        for name in sorted(set(hf) - known)
    ]
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(k not in ("full_attention", "sliding_attention") for k in kinds):
        problems.append(f"layer_types={kinds!r} has other layers than attention")
    if problems:
        raise ConfigError(f"{where} is a {kind} that parallax cannot represent: {'; '.join(problems)}")
    _complete(found)
    return {f"model.{f.name}": found[f.name] for f in fields(ModelConfig) if f.name in found}


def _complete(found: dict[str, Any]) -> None:
    """Add the sizes that follow from others, so that no default of ours takes their place."""
    found["kv_heads"] = found.get("kv_heads") or found["heads"]
    if found.get("ffn") is None:
        found["ffn"] = 4 * found["hidden"]
    if found.get("head_dim") is None:
        found["head_dim"] = found["hidden"] // max(1, found["heads"])


def _is(value: Any, wanted: type) -> bool:
    if wanted is float:
        return value_fits(value, float)
    return isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))


def _rope(hf: Mapping[str, Any], found: dict[str, Any]) -> list[str]:
    """Read the rotary base; the problems of everything else that could be said of rotary positions."""
    problems = []
    bases = [hf["rope_theta"]] if hf.get("rope_theta") is not None else []
    for name in ("rope_scaling", "rope_parameters"):
        rope = hf.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            return [f"{name}={rope!r} is no object"]
        rest = dict(rope)
        kind = rest.pop("rope_type", rest.pop("type", "default"))
        rest.pop("type", None)
        bases += [rest.pop("rope_theta")] if "rope_theta" in rest else []
        if rest.get("partial_rotary_factor") in (1, None):
            rest.pop("partial_rotary_factor", None)
        if kind != "default" or rest:
            problems.append(f"{name}={rope}: the rotary positions here are plain, with model.rope_theta alone")
    if any(not _is(base, float) or base != bases[0] for base in bases):
        problems.append(f"rope_theta is given as {bases}")
    else:
        found["rope_theta"] = float(bases[0]) if bases else 10000.0
    return problems


def disagreements(config: Config, hf: Mapping[str, Any]) -> list[str]:
    """What of a configuration is not what config.json says: the keys to set, and a sequence beyond a window."""
    problems = []
    wrong = {
        name: value for name, value in model_keys(hf, config.init_from).items() if _value(config.model, name) != value
    }
    if wrong:
        now = ", ".join(f"{name}={_shown(_value(config.model, name))}" for name in wrong)
        fix = " ".join(f"{name}={_shown(value)}" for name, value in wrong.items())
        problems.append(f"init_from={config.init_from} is another model than {now}; leave these keys out, or set {fix}")
    length = config.corpus.sequence_length
    window = _window(hf)
    if window is not None and (not isinstance(window, int) or window < length):
        problems.append(
            f"init_from={config.init_from} attends to the last {window} tokens only (sliding_window), the model here "
            f"to all {length} of corpus.sequence_length; set corpus.sequence_length to at most {window}"
        )
    return problems


def _window(hf: Mapping[str, Any]) -> Any:
    """Tokens that an attention layer sees; None for all. What is absent has the default of the family."""
    if hf.get("model_type") == "mistral":
        return hf.get("sliding_window", 4096)
    return hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None


def _value(model: ModelConfig, name: str) -> Any:
    short = name.removeprefix("model.")
    return getattr(model, RESOLVED.get(short, short))


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def family_of(model: ModelConfig) -> str:
    """The family whose shape this is. Raises ConfigError."""
    shape = (model.positions, model.norm, model.activation)
    if shape == ("learned", "layernorm", "gelu"):
        return "gpt2"
    if shape == ("rotary", "rmsnorm", "swiglu"):
        return "qwen3" if model.qk_norm else "llama"
    raise ConfigError(
        f"no Hugging Face family has model.positions={shape[0]} model.norm={shape[1]} model.activation={shape[2]}; "
        "GPT-2 has learned, layernorm, gelu; Llama, Qwen3 and Mistral have rotary, rmsnorm, swiglu"
    )


def make_hf_config(config: Config, family: str, dtype: str, origin: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model. origin: that of the model from which the run began, whose other keys it keeps.

    Raises ConfigError where the family cannot hold the model.
    """
    if family not in FAMILIES:
        raise ConfigError(f"family {family!r} is not known; choose one of {', '.join(FAMILIES)}")
    model, kind = config.model, FAMILIES[family]
    made: dict[str, Any] = {} if origin is None or origin.get("model_type") != family else dict(origin)
    for stale in ("_name_or_path", "dtype", "torch_dtype", "rope_scaling", "rope_parameters"):
        made.pop(stale, None)
    length = config.corpus.sequence_length
    made |= {"model_type": family, "architectures": [kind.architecture], "torch_dtype": dtype}
    if family == "gpt2":
        model = replace(model, max_positions=model.max_positions or length)
        made.pop("n_ctx", None)
    made |= {theirs: _value(model, ours) for ours, (theirs, _, _) in kind.names.items()}
    made["tie_word_embeddings"] = model.tie_embeddings
    for name, value in {**kind.rest, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}.items():
        made.setdefault(name, value)
    for name, allowed in kind.only.items():
        if made.get(name) not in allowed or name not in made:
            made[name] = allowed[0]
    if family != "gpt2":
        made["rope_theta"] = model.rope_theta
        made["max_position_embeddings"] = max(length, made.get("max_position_embeddings") or 0)
    if family == "llama":
        made["mlp_bias"] = model.bias
    wrong = {name: value for name, value in model_keys(made).items() if _value(model, name) != value}
    if family == "gpt2" and not model.bias:
        wrong.pop("model.bias")  # written as zeros: the same model
    if wrong:
        asked = ", ".join(f"{name}={_shown(_value(model, name))}" for name in wrong)
        raise ConfigError(f"a {family} cannot have {asked}; choose another family, one of {', '.join(FAMILIES)}")
    return made
