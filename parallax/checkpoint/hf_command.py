"""`parallax checkpoint export`: a checkpoint for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from parallax.arguments import take_options
from parallax.checkpoint.hf_export import export_hf
from parallax.checkpoint.place import place
from parallax.config_hf import FAMILIES
from parallax.errors import ConfigError

__all__ = ["USAGE", "run_export"]

USAGE = f"""parallax checkpoint export DIR --to hf OUT [options]
  DIR                    a checkpoint, such as OUTPUT/checkpoints/step-00000100
  OUT                    the new directory: config.json, model.safetensors, the tokenizer's files where known
  --dtype NAME           float32, bfloat16, float16 or float64; the run's dtype unless told
  --family NAME          {", ".join(FAMILIES)}; that of init_from unless told, else what the model's shape says
  --max-shard-bytes N    a larger model is written as several files and an index; 5000000000 unless told
  --tokenizer DIR        where tokenizer files lie; OUTPUT/hf unless told, where init_from has put them"""

OPTIONS = ("--to", "--dtype", "--family", "--max-shard-bytes", "--tokenizer")


def run_export(argv: Sequence[str]) -> int:
    """Write a checkpoint as a Hugging Face model directory."""
    if "--help" in argv or "-h" in argv:
        print(f"usage: {USAGE}")
        return 0
    options, rest = take_options(argv, "export", OPTIONS)
    if options.get("--to", "hf") != "hf":
        raise ConfigError(f"--to {options['--to']} is not known; the one format is hf, as in --to hf OUT")
    if len(rest) != 2 or "--to" not in options:
        raise ConfigError(f"export takes DIR --to hf OUT, and got {' '.join(argv) or 'nothing'}\nusage: {USAGE}")
    size = options.get("--max-shard-bytes", "5000000000").replace("_", "")
    if not size.isascii() or not size.isdigit():
        raise ConfigError(f"--max-shard-bytes {size} is no number of bytes; write digits, as in 5000000000")
    tokenizer = options.get("--tokenizer")
    done = export_hf(
        place(rest[0]),
        Path(rest[1]),
        family=options.get("--family"),
        dtype=options.get("--dtype"),
        max_shard_bytes=int(size),
        companions=Path(tokenizer) if tokenizer else None,
    )
    print(f"{done.path}: {done.family}, {done.num_tensors} tensors, {done.num_bytes:,} bytes in {done.dtype}")
    print(f"  {', '.join(done.files)}")
    print(f"  copied: {', '.join(done.companions)}" if done.companions else "  no tokenizer is known; --tokenizer DIR")
    return 0
