"""What a key that does not exist was meant to be: other frameworks' names, bare last components, misspellings."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches

from parallax.config_fields import keys, sections

__all__ = ["NAMES_ELSEWHERE", "did_you_mean", "unknown_key"]

# What other frameworks call our keys: Megatron-LM, nanotron, torchtitan, nanoGPT, DeepSpeed, Hugging Face. Compared
# in lower case with _ for -, first with the whole dotted name, then with its last component. A * marks a name whose
# value means something else (another unit, the opposite, one of two numbers): a suggestion leaves the value out.
NAMES_ELSEWHERE: Mapping[str, str] = {
    "steps": "train_iters train_steps max_iters max_steps num_train_steps total_steps num_iterations",
    "dtype": "bf16* fp16* fp8* params_dtype torch_dtype mixed_precision_param",
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
    "data.bucket_bytes": "ddp_bucket_size* bucket_cap_mb* reduce_bucket_size* bucket_size*",
    "data.grad_dtype": "accumulate_allreduce_grads_in_fp32* accumulate_grad_in_fp32* grad_accum_dtype "
    "mixed_precision_reduce main_grads_dtype",
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


def unknown_key(name: str, value: str | None = None) -> str:
    """The message for a key that does not exist. value: its text, where the suggestion should carry it."""
    if name in sections():
        first = next(known for known in keys() if known.startswith(f"{name}."))
        return f"{name} is a section; set its keys, such as {first}"
    return f"unknown key {name}; {did_you_mean(name, value)}--help lists all keys"


def did_you_mean(name: str, value: str | None = None) -> str:
    """`did you mean model.layers=4? `, or nothing if no key comes close."""
    matches = _matches(name)
    axis = next((target for target in matches if target.startswith("mesh=")), None)
    if axis:
        size = value if value and value.isdecimal() else "N"
        return f"did you mean {axis}{size}? mesh is data x tensor x pipeline, as in mesh=2x4x1; "
    options = [target if value is None or not carries else f"{target}={value}" for target, carries in matches.items()]
    return f"did you mean {' or '.join(options[:3])}? " if options else ""


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
