"""config.json of Hugging Face: whatever it holds is a model of ours or a ConfigError."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallax.config import Config, check
from parallax.config_hf import FAMILIES, disagreements, make_hf_config, model_keys
from parallax.config_io import with_overrides
from parallax.errors import ConfigError

LLAMA = {"model.heads": 8, "model.kv_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"model.bias": True, "model.head_dim": 4},
    "mistral": LLAMA | {"model.rope_theta": 1e6},
    "qwen3": LLAMA | {"model.qk_norm": True, "model.head_dim": 4, "model.tie_embeddings": True},
    "gpt2": {
        "model.positions": "learned",
        "model.norm": "layernorm",
        "model.activation": "gelu",
        "model.bias": True,
        "model.norm_eps": 1e-3,
    },
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back(family: str):
    config = with_overrides(Config(), SHAPES[family])
    hf = make_hf_config(config, family, "float32")
    resolved = {
        "model.kv_heads": config.model.num_kv_heads,
        "model.head_dim": config.model.head_size,
        "model.ffn": config.model.ffn_size,
        "model.max_positions": config.corpus.sequence_length if family == "gpt2" else None,
    }
    config = with_overrides(config, resolved)
    assert with_overrides(Config(), model_keys(hf)).model == config.model
    assert disagreements(config, hf) == []


def test_gpt_2_keeps_its_positions_whatever_is_trained_on():
    config = with_overrides(Config(), SHAPES["gpt2"] | {"model.max_positions": 1024})
    hf = make_hf_config(config, "gpt2", "float32")
    assert (hf["n_positions"], config.corpus.sequence_length) == (1024, 128)
    assert model_keys({k: v for k, v in hf.items() if k != "n_positions"})["model.max_positions"] == 1024
    shorter = with_overrides(config, {"model.max_positions": 128})
    assert "set model.max_positions=1024" in disagreements(shorter, hf)[0]


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(max_examples=300)
def test_any_value_of_any_key_is_read_or_refused(family: str, data: st.DataObject):
    hf = make_hf_config(with_overrides(Config(), SHAPES[family]), family, "float32")
    names = [*hf, "sliding_window", "use_sliding_window", "layer_types", "rope_scaling", "rope_parameters", "head_dim"]
    for name in data.draw(st.lists(st.sampled_from(sorted(set(names))), min_size=1, max_size=3)):
        hf[name] = data.draw(VALUES)
    rope = {"rope_type": "default"} | data.draw(st.dictionaries(st.just("rope_theta"), VALUES))
    if data.draw(st.booleans()):
        hf["rope_parameters"] = rope
    with contextlib.suppress(ConfigError):
        config = with_overrides(Config(), model_keys(hf))
        assert all(isinstance(problem, str) for problem in check(config) + disagreements(config, hf))
