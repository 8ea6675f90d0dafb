"""What a key that does not exist was meant to be: other frameworks' names, bare last components, misspellings."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Literal

from parallax.config_fields import Key, keys, sections

__all__ = ["NAMES_ELSEWHERE", "VALUES_ELSEWHERE", "did_you_mean", "unknown_key", "value_hint"]

# What other frameworks call our keys: Megatron-LM, nanotron, torchtitan, nanoGPT, DeepSpeed, Hugging Face. Compared
# in lower case with _ for -, first with the whole dotted name, then with its last component. A * marks a name whose
# value means something else (another unit, the opposite, one of two numbers): a suggestion leaves the value out. A
# target with a value stands for switches there that are one value of a key here.
NAMES_ELSEWHERE: Mapping[str, str] = {
    "steps": "train_iters train_steps max_iters max_steps num_train_steps total_steps num_iterations",
    "dtype": "params_dtype torch_dtype mixed_precision_param mixed_precision",
    "dtype=bfloat16": "bf16 bf16.enabled bfloat16.enabled use_bf16",
    "dtype=float16": "fp16 fp16.enabled use_fp16",
    "dtype=float8": "fp8 fp8_format fp8.enabled enable_fp8",
    "compile": "torch_compile compile.enable",
    "recompute": "activation_checkpoint.mode recompute_granularity activation_checkpoint_mode",
    "recompute=selective": "recompute_activations",
    "recompute=full": "gradient_checkpointing activation_checkpointing checkpoint_activations recompute_layer "
    "full_recompute",
    "output": "save out_dir output_dir save_dir dump_folder checkpoints_path run_dir",
    "init_from": "from_pretrained pretrained_model_name_or_path pretrained_checkpoint initial_load_path",
    "resume": "load load_dir resume_from_checkpoint resume_checkpoint_path load_step* load_path",
    "log_every": "log_interval log_freq logging_steps steps_per_print iteration_step_info_interval",
    "model.layers": "num_layers n_layer n_layers num_hidden_layers nlayers depth",
    "model.hidden": "hidden_size n_embd d_model dim model_dim embed_dim embedding_dim",
    "model.heads": "num_attention_heads n_head n_heads num_heads nheads",
    "model.kv_heads": "num_query_groups num_key_value_heads n_kv_heads num_kv_heads n_kv_head group_query_attention*",
    "model.head_dim": "kv_channels head_size d_head",
    "model.ffn": "ffn_hidden_size intermediate_size n_inner ffn_dim d_ff hidden_dim mlp_ratio* ffn_dim_multiplier*",
    "model.vocab": "vocab_size padded_vocab_size n_vocab",
    "model.tie_embeddings": "tie_word_embeddings untie_embeddings_and_output_weights* enable_weight_tying",
    "model.dropout": "hidden_dropout attention_dropout resid_pdrop embd_pdrop attn_pdrop dropout_p",
    "model.positions": "position_embedding_type positional_embedding use_rotary_position_embeddings* pos_emb",
    "model.norm": "normalization norm_type",
    "model.activation": "hidden_act activation_function swiglu* act_fn",
    "model.qk_norm": "qk_layernorm use_qk_norm",
    "model.bias": "add_bias_linear disable_bias_linear* attention_bias mlp_bias",
    "model.rope_theta": "rotary_base rotary_emb_base rope_base theta",
    "model.norm_eps": "norm_epsilon layernorm_epsilon layer_norm_epsilon layer_norm_eps rms_norm_eps",
    "model.init_std": "init_method_std initializer_range std",
    "model.vocab_multiple": "make_vocab_size_divisible_by pad_to_multiple_of*",
    "corpus.source": "data_path dataset dataset_path dataset_name hf_dataset_or_datasets train_data_path",
    "corpus.sequence_length": "seq_length seq_len block_size max_seq_len max_seq_length max_position_embeddings "
    "n_positions n_ctx context_length sequence_len",
    "corpus.validation_fraction": "val_fraction validation_split test_size",
    "batch.global_size": "global_batch_size train_batch_size batch_size",
    "batch.microbatch_size": "micro_batch_size train_micro_batch_size_per_gpu per_device_train_batch_size "
    "device_batch_size local_batch_size pipeline_parallel_microbatch_size batch_size",
    "batch.num_microbatches": "gradient_accumulation_steps batch_accumulation_per_replica grad_accum_steps",
    "pipeline.schedule": "pp_engine* pipeline_parallel_schedule pp_schedule pipeline_schedule "
    "num_layers_per_virtual_pipeline_stage* virtual_pipeline_model_parallel_size*",
    "pipeline.split": "pipeline_parallel_split_points* pipeline_model_parallel_layout* module_fqns_per_model_part* "
    "decoder_first_pipeline_num_layers* decoder_last_pipeline_num_layers*",
    "tensor.sequence_parallel": "tp_mode* enable_sequence_parallel",
    "data.zero": "zero_stage zero_optimization.stage",
    "data.zero=1": "use_distributed_optimizer",
    "data.zero=3": "fsdp use_torch_fsdp2 use_megatron_fsdp",
    "data.bucket_bytes": "ddp_bucket_size* bucket_cap_mb* reduce_bucket_size* bucket_size*",
    "data.grad_dtype": "accumulate_allreduce_grads_in_fp32* accumulate_grad_in_fp32* grad_accum_dtype "
    "mixed_precision_reduce main_grads_dtype",
    "precision.loss_scale": "initial_loss_scale initial_scale_power*",
    "optimizer.name": "optim* optimizer.type* optimizer_type*",
    "optimizer.offload": "optimizer_cpu_offload offload_optimizer* cpu_offload*",
    "optimizer.lr": "learning_rate warmup_max_lr max_lr peak_lr",
    "optimizer.weight_decay": "wd",
    "optimizer.betas": "adam_beta1* adam_beta2* beta1* beta2*",
    "optimizer.eps": "adam_eps adam_epsilon epsilon",
    "optimizer.warmup_steps": "lr_warmup_iters lr_warmup_steps warmup_iters warmup_num_steps num_warmup_steps",
    "optimizer.decay_steps": "lr_decay_iters lr_decay_steps total_num_steps lr_scheduler.decay_ratio*",
    "optimizer.min_lr": "min_decay_lr min_lr_factor* lr_min",
    "optimizer.schedule": "lr_decay_style lr_scheduler_type decay_type decay_lr* lr_schedule",
    "optimizer.max_grad_norm": "clip_grad grad_clip gradient_clipping max_norm grad_norm_clip gradient_clip_val",
    "checkpoint.every": "save_interval save_steps checkpoint_interval checkpoint.interval checkpoint.enable*",
    "checkpoint.background": "async async_save async_mode* checkpoint.async_mode*",
    "checkpoint.keep": "save_total_limit keep_latest_k",
    "validation.every": "eval_interval eval_steps val_check_interval validator.freq",
    "validation.batches": "eval_iters limit_val_batches validator.steps",
    "mesh=data": "dp data_parallel_size dp_degree data_parallel_replicate_degree data_parallel_shard_degree",
    "mesh=tensor": "tp tensor_model_parallel_size tensor_parallel_size tensor_parallel_degree tp_degree tp_size",
    "mesh=pipeline": "pp pipeline_model_parallel_size pipeline_parallel_size pipeline_parallel_degree pp_degree "
    "pp_size",
    "mesh=context": "cp context_parallel_size context_parallel_degree cp_size",
    "mesh=expert": "ep expert_model_parallel_size expert_parallel_size expert_parallel_degree ep_size",
}
VALUES_ELSEWHERE: Mapping[str, str] = {
    "float64": "fp64 double f64",
    "float32": "fp32 float f32 32 32-true",
    "bfloat16": "bf16 bf16-mixed bf16-true",
    "float16": "fp16 half f16 16 16-mixed 16-true",
    "float8": "fp8 float8_e4m3fn e4m3 hybrid",
    "adamw": "adam adamw_torch adamw_torch_fused fusedadam adam8bit",
}
NO = ("false", "no", "off", "0", "none", "null")


def unknown_key(name: str, value: str | None = None, *, carry: bool = True) -> str:
    """The message for a key that does not exist. value: its text; carry: whether the suggestion should have it."""
    if name in sections():
        first = next(known for known in keys() if known.startswith(f"{name}."))
        return f"{name} is a section; set its keys, such as {first}"
    return f"unknown key {name}; {did_you_mean(name, value, carry=carry)}--help lists all keys"


def value_hint(name: str, value: str, key: Key) -> str:
    """`; did you mean dtype=bfloat16?` for a value that is none of the key's, or nothing if none comes close.
    name: what the key was called.
    """
    meant = _value_here(key, value)
    return f"; did you mean {name}={meant}?" if meant else ""


def _value_here(key: Key, value: str) -> str | None:
    """Which of a key's few values this one is, in the words of others or misspelt; of other keys None."""
    names = [name for name in typing.get_args(key.kind) if isinstance(name, str)]
    word = value.strip().lower().removeprefix("torch.")
    meant = [ours for ours in names if word == ours or word in VALUES_ELSEWHERE.get(ours, "").split()]
    return next(iter(meant or get_close_matches(word, names, n=1)), None)


def did_you_mean(name: str, value: str | None = None, *, carry: bool = True) -> str:
    """`did you mean model.layers=4? `, or nothing if no key comes close."""
    matches = _matches(name)
    axis = next((target for target in matches if target.startswith("mesh=")), None)
    if axis:
        size = value if value and value.isdecimal() else "N"
        return f"did you mean {axis}{size}? mesh is data x tensor x pipeline, as in mesh=2x4x1; "
    options = [_option(target, value, carry and carries) for target, carries in matches.items()]
    return f"did you mean {' or '.join(options[:3])}? " if options else ""


def _option(target: str, value: str | None, carries: bool) -> str:
    key, fixed, _ = target.partition("=")
    if fixed:  # a switch that is off says which value is not meant
        return key if value is not None and value.strip().lower() in NO else target
    if target in keys() and typing.get_origin(keys()[target].kind) is Literal and value is not None:
        value = _value_here(keys()[target], value)
    return f"{key}={value}" if carries and value is not None else key


def _matches(name: str) -> dict[str, bool]:
    """The keys that an unknown name may stand for, likeliest first, and whether its value carries over."""
    targets: dict[str, dict[str, bool]] = {known: {known: True} for known in keys()}
    for known in keys():
        targets.setdefault(known.rpartition(".")[2], {})[known] = True
    for target, names in NAMES_ELSEWHERE.items():
        for alias in names.split():
            targets.setdefault(alias.removesuffix("*"), {})[target] = not alias.endswith("*")
    whole = name.lstrip("-").lower().replace("-", "_")
    last = whole.rpartition(".")[2]
    for exact in (whole, last):
        if exact in targets:
            return targets[exact]
    close = get_close_matches(whole, keys(), n=1, cutoff=0.75) or get_close_matches(last, targets, n=1, cutoff=0.75)
    return targets[close[0]] if close else {}
