"""Hugging Face both ways on one rank: what is written, what is refused, what is carried along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallax.checkpoint import files, hf_export, hf_import
from parallax.checkpoint.hf_export import export_hf
from parallax.checkpoint.store import LocalStore
from parallax.cli import main
from parallax.config_io import load
from parallax.errors import CheckpointError, ConfigError
from parallax.mesh import init_mesh
from parallax.resume import Checkpoints, prepare_output
from tests.hf_models import BASE, SHAPES, load_hf_logits, local_logits, run_of, save_our_model, whole_logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Any]:
    """Checkpoints of every shape: (directory, logits, parameters)."""
    return {name: save_our_model(name, tmp_path_factory.mktemp(name)) for name in SHAPES}


@pytest.fixture
def exported(saved, tmp_path: Path):
    """A fresh Hugging Face directory of one shape, to be changed at will."""

    def make(name: str = "llama", **options: Any) -> Path:
        return export_hf(saved[name][0], tmp_path / name, **options).path

    return make


def edit(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    data |= changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def begin(directory: Path, **changes: Any) -> torch.Tensor:
    run, state = run_of("1x1x1", {"init_from": directory} | changes)
    Checkpoints(run, directory / "run").begin(state)
    return whole_logits([local_logits(run)])


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_what_parallax_does(saved, tmp_path: Path, name: str):
    pytest.importorskip("transformers", reason="it is in the test extra")
    directory, logits, _ = saved[name]
    out, argv = tmp_path / "out", ["checkpoint", "export", str(directory), "--to", "hf"]
    more = ["--family=mistral"] if name == "mistral" else []
    assert main([*argv, str(out), "--max-shard-bytes", "60_000", *more]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert logits.abs().max() > 1
    assert (load_hf_logits(out) - logits).abs().max() <= 1e-4
    assert json.loads((out / "config.json").read_text())["model_type"] == name.partition("-")[0]
    assert (begin(out) - logits).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_masters_are_rounded_once(saved, tmp_path: Path, dtype: str):
    directory, _, values = saved["qwen3"]
    export_hf(directory, tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out/model.safetensors")
    kind = getattr(torch, dtype)
    assert written["model.layers.1.self_attn.q_norm.weight"].equal(values["layers.1.attention.q_norm.weight"].to(kind))
    assert {tensor.dtype for tensor in written.values()} == {kind}
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == dtype


def test_a_run_in_bfloat16_begins_with_float32_masters(exported, saved):
    run, state = run_of("1x1x1", {"init_from": exported("qwen3"), "dtype": "bfloat16"})
    Checkpoints(run, Path("unused")).begin(state)
    values = saved["qwen3"][2]
    for stage, flat in run.flats.items():
        masters = state.optimizer.flat_state(stage)["parameters"]
        for piece in flat.pieces:
            master = masters[piece.segment][piece.start : piece.stop].view(piece.spec.global_shape)
            assert master.dtype == torch.float32 and master.equal(values[piece.spec.name]), piece.spec.name
    weight = dict(run.stages[0].named_parameters())["layers.0.mlp.down.weight"]
    assert weight.equal(values["layers.0.mlp.down.weight"].bfloat16())


def test_neither_way_has_more_than_a_block_in_memory(saved, tmp_path: Path, monkeypatch):
    sizes: list[int] = []

    def spy(module: Any, name: str) -> None:
        true = getattr(module, name)

        def wrapper(*args: Any) -> Any:
            result = true(*args)
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else len(result) // 4)
            return result

        monkeypatch.setattr(module, name, wrapper)

    spy(hf_export, "as_bytes")
    spy(hf_export, "read_global")
    spy(hf_import, "read_part")
    monkeypatch.setattr(hf_export, "BLOCK_ELEMENTS", 500)
    monkeypatch.setattr(files, "BLOCK_ELEMENTS", 500)
    directory, logits, _ = saved["gpt2"]
    begun = begin(export_hf(directory, tmp_path / "out").path)
    assert (begun - logits).abs().max() <= 1e-6
    assert len(sizes) > 500 and max(sizes) <= 500


def test_the_tokenizer_and_the_family_go_along(exported, tmp_path: Path):
    source = exported("llama", family="mistral")
    edit(source / "config.json", eos_token_id=7, max_position_embeddings=4000, sliding_window=16, torch_dtype="float32")
    (source / "tokenizer.json").write_text("{}")
    (source / "weights.txt").write_text("no companion")
    run, state = run_of("1x1x1", {"init_from": source, "output": tmp_path / "run"})
    output = prepare_output(run.config, init_mesh("1x1x1", device_type="cpu"))
    checkpoints = Checkpoints(run, output)
    checkpoints.take_lock()
    checkpoints.begin(state)
    shutil.rmtree(source)
    done = export_hf(checkpoints.save(state), tmp_path / "out")
    assert (done.family, done.companions) == ("mistral", ["tokenizer.json"])
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["eos_token_id"], config["max_position_embeddings"], config["sliding_window"]) == (7, 4000, 16)
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out/weights.txt").exists()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "t5"}')
    (foreign / "vocab.json").write_text("{}")
    done = export_hf(checkpoints.directory / "step-00000000", tmp_path / "again", companions=foreign)
    assert (done.family, done.companions) == ("mistral", ["vocab.json"])
    assert json.loads((tmp_path / "again/config.json").read_text()) == config


def test_files_of_old_versions_are_read(exported, saved):
    """Names without their prefix, the buffers of the causal mask, a head beside the embedding that it is tied to."""
    directory = exported("gpt2")
    path = directory / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8)
    tensors["lm_head.weight"] = tensors["wte.weight"].clone()
    tensors["wpe.weight"] = torch.cat([tensors["wpe.weight"], torch.ones(4, 48)])  # positions beyond the sequence
    save_file(tensors, path, {"format": "pt"})
    edit(directory / "config.json", n_positions=20, n_ctx=20, tie_word_embeddings=...)
    assert (begin(directory) - saved["gpt2"][1]).abs().max() <= 1e-6
    tensors["lm_head.weight"][3, 3] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match="ties the head to the embedding, but holds a lm_head.weight that differs"
    ):
        begin(directory)


CONFIGS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "the rotary positions here are plain"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "the rotary positions here are plain"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        r"rope_theta is given as \[700.0, 5.0\]",
    ),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not known here"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config=.* is not known here"),
    ("llama", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu', and the model here has 'silu'"),
    ("llama", {"pretraining_tp": 2}, "pretraining_tp=2, and the model here has 1"),
    ("llama", {"model_type": "gemma3"}, "model_type='gemma3' is not supported; what is: llama, mistral, qwen3, gpt2"),
    ("llama", {"num_hidden_layers": ...}, "num_hidden_layers is missing"),
    ("llama", {"num_hidden_layers": "3"}, "num_hidden_layers='3' is no int"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers=True is no int"),
    ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "other layers than attention"),
    ("mistral", {"sliding_window": 15}, "attends to the last 15 tokens only .* at most 15"),
    ("mistral", {"num_key_value_heads": ...}, "num_key_value_heads is missing"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "attends to the last 8 tokens only"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True, and the model here has False"),
    ("gpt2", {"n_positions": 12}, "12 learned positions, corpus.sequence_length is 16; set .* to at most 12"),
    ("gpt2", {"activation_function": "gelu"}, "activation_function='gelu', and the model here has 'gelu_new'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False"),
]


@pytest.mark.parametrize(("name", "changes", "message"), CONFIGS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_represented_is_refused(exported, name: str, changes: dict[str, Any], message: str):
    directory = exported(name, family="mistral" if name == "mistral" else None)
    edit(directory / "config.json", **changes)
    with pytest.raises(ConfigError, match=message):
        load([f"{key}={value}" for key, value in (BASE | {"init_from": directory}).items()])


def test_keys_that_disagree_are_listed_with_what_to_set(exported):
    directory = exported("qwen3")
    with pytest.raises(ConfigError) as caught:
        load([f"init_from={directory}", "model.layers=2", "model.kv_heads=4", "model.ffn=80", "model.norm=layernorm"])
    assert "set model.layers=3 model.kv_heads=2 model.norm=rmsnorm" in str(caught.value)
    config = load([f"init_from={directory}", "corpus.sequence_length=9", "model.dropout=0.1", "model.layers=3"])
    assert (config.model.qk_norm, config.model.head_dim, config.model.dropout) == (True, 16, 0.1)
    again = load([f"init_from={directory}", "model.rope_theta=10000.0", "model.heads=4"])
    assert again.model.tie_embeddings


def test_no_config_of_ours_is_written_as_a_family_that_cannot_hold_it(saved, tmp_path: Path):
    directory = saved["llama-bias-tied"][0]
    with pytest.raises(ConfigError, match="a mistral cannot have model.bias=true; choose another family"):
        export_hf(directory, tmp_path / "out", family="mistral")
    with pytest.raises(ConfigError, match="a gpt2 cannot have .*model.norm=rmsnorm"):
        export_hf(directory, tmp_path / "out", family="gpt2")
    mixed = save_our_model("llama", tmp_path / "run", **{"model.norm": "layernorm"})[0]
    with pytest.raises(ConfigError, match="no Hugging Face family has model.positions=rotary model.norm=layernorm"):
        export_hf(mixed, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_an_export_overwrites_nothing_and_leaves_nothing(saved, tmp_path: Path, monkeypatch, capsys):
    directory, out = saved["llama"][0], tmp_path / "new/out"
    argv = ["checkpoint", "export", str(directory), "--to", "hf", str(out)]

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device", str(out))

    with monkeypatch.context() as broken:
        broken.setattr(LocalStore, "write", full)
        assert main(argv) == 2
    assert "No space left on device" in capsys.readouterr().err and not list((tmp_path / "new").iterdir())
    assert main(argv) == 0 and main(argv) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    for wrong, message in (
        (["--dtype", "int8"], "dtype 'int8' is not supported"),
        (["--family", "t5"], "family 't5' is not known"),
        (["--max-shard-bytes", "5GB"], "no number of bytes"),
        (["--shards", "2"], "--shards is no option of export"),
        (["--tokenizer", str(tmp_path / "none")], "is no directory"),
    ):
        assert main([*argv[:-1], str(tmp_path / "other"), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["checkpoint", "export", str(directory)]) == 2
    assert main(["checkpoint", "--help"]) == 0


def test_an_altered_checkpoint_is_not_exported(saved, tmp_path: Path):
    copy = tmp_path / "step-00000000"
    shutil.copytree(saved["llama"][0], copy)
    path = copy / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="was altered"):
        export_hf(copy, tmp_path / "out")
