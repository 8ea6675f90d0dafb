"""Train a GPT on any mesh: the whole job, top to bottom.

python recipes/gpt.py                                                   one process
torchrun --nproc_per_node 8 recipes/gpt.py mesh=2x2x2                   data x tensor x pipeline
python recipes/gpt.py config=recipes/gpt2.yaml optimizer.lr=3e-4        a file, and a key on top
python recipes/gpt.py --help                                            every key
"""

import itertools

from parallax.assemble import DTYPES, assemble
from parallax.batches import token_batches, validation_batches
from parallax.config_io import parse_command_line
from parallax.corpus import corpus_for
from parallax.launch import entrypoint
from parallax.memory_report import describe_memory
from parallax.mesh import init_mesh
from parallax.metrics import Metrics
from parallax.resume import Checkpoints, prepare_output
from parallax.step import evaluate, train_step
from parallax.stop import Stop
from parallax.trace import traced


def main() -> None:
    config = parse_command_line()
    mesh = init_mesh(config.mesh, device_type=config.device)
    corpus = corpus_for(config)
    run, state = assemble(config, mesh)
    output = prepare_output(config, mesh)
    checkpoints = Checkpoints(run, output)
    checkpoints.take_lock()
    metrics = Metrics(
        mesh,
        output,
        num_steps=config.steps,
        flops_per_token=run.plan.flops_per_token,
        dtype=DTYPES[config.dtype],
        log_every=config.log_every,
    )
    metrics.say(f"mesh {mesh.shape.describe()} on {mesh.device.type}, {config.dtype}; output {output}")
    metrics.say(corpus.describe())
    metrics.say(run.describe())
    if resumed := checkpoints.resume(state):
        metrics.say(resumed)
    elif begun := checkpoints.begin(state):
        metrics.say(begun)

    stop = Stop(config.time_limit).listen()
    batches = token_batches(corpus.train, seed=config.seed, start_step=state.batches, **run.share)
    metrics.resume()
    with checkpoints:  # a save under way gets the time to complete, whatever ends the run
        for number, batch in enumerate(itertools.takewhile(lambda _: state.step < config.steps, batches)):
            with traced(run, output, step=state.step + 1) as told:
                result = train_step(run, state, batch, stop)
            metrics.lap()
            for line in told if number else [*told, describe_memory(run, state)]:
                metrics.say(line)
            last = state.step == config.steps
            extra = {}
            if config.validation.every and (state.step % config.validation.every == 0 or last) and not stop.agreed:
                held_out = validation_batches(corpus.validation, num_batches=config.validation.batches, **run.share)
                val_loss = evaluate(run, held_out, stop)
                extra = {} if stop.agreed else {"val_loss": val_loss}
            metrics.record(result, **extra)
            for line in checkpoints.news():
                metrics.say(line)
            if result.skipped and config.on_nan == "rollback":
                metrics.say(checkpoints.roll_back(state))
                metrics.resume()
                continue
            if config.checkpoint.every and (state.step % config.checkpoint.every == 0 or last or stop.agreed):
                metrics.say(checkpoints.save_or_warn(state, last=last or stop.agreed))
            if stop.agreed:
                metrics.say(f"{stop.reason}: ended after step {state.step}; {checkpoints.how_to_go_on()}")
                break
            metrics.resume()
    metrics.close()


if __name__ == "__main__":
    entrypoint(main)
